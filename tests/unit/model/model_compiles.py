"""A compiled model beside an eager one, started by test_compile.py in a process without the checks of shapes, which
cannot be compiled. Prints one JSON object."""

from __future__ import annotations

import functools
import json
import sys

import torch
from torch._dynamo.utils import counters

from picollm.config.model import Architecture
from picollm.model.gpt import GPT, Block

ROWS, T, C = 2, 24, 32
FULL = {
    "sliding_window": 5,
    "window_pattern": "SSSL",
    "final_logit_softcapping": 3.0,
    "value_embeddings": True,
    "x0_scalars": True,
    "smear": True,
    "backout": True,
}


def make(features: dict[str, object], dtype: torch.dtype, layers: int) -> GPT:
    values = {
        "arch": "portable", "hidden_size": C, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 4 * C, "vocab_size": 50,
        "max_position_embeddings": T, "rope_theta": 10_000.0,
    }  # fmt: skip
    model = GPT(Architecture.model_validate(values | features), compute_dtype=dtype).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape, dtype=dtype).normal_(0, 0.2, generator=generator))
    return model


def gradients(model: GPT, ids: torch.Tensor, bounds: torch.Tensor | None = None) -> list[torch.Tensor]:
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    loss = model.loss(ids, targets, scale=1 / 46, z_loss=0.01, bounds=bounds)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def saved_per_token(dtype: torch.dtype) -> float:
    """Elements per token and channel that a compiled block keeps for its gradient, weights left out."""
    model = make({}, dtype, 1)
    x = torch.randn(ROWS, T, C, dtype=dtype, requires_grad=True)
    one = torch.ones((), dtype=dtype, requires_grad=True)
    block = torch.compile(Block.forward, fullgraph=True, dynamic=False)
    out = block(model.layers[0], x, one, None, None, None, model.rotary(T)[:, None], "sdpa", None)
    kept = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in out.grad_fn.saved_tensors
        if tensor is not None and tensor.shape[:1] in ((ROWS,), (ROWS * T,))
    }
    return sum(kept.values()) / (x.element_size() * x.numel())


def main(backend: str) -> None:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend=backend)
    # Torch's is 8: kinds of block times sizes of the device batch may be more, as may the kinds here be more than 2.
    torch._dynamo.config.recompile_limit = 2
    result: dict[str, object] = {}
    ids = torch.randint(0, 50, (ROWS, T), generator=torch.Generator().manual_seed(2))
    for name, features in (("portable", {}), ("full", FULL)):
        torch.compiler.reset()
        counters.clear()
        plain, compiled = (make(features, torch.float64, 5) for _ in range(2))
        compiled.compile_blocks()
        pairs = zip(gradients(compiled, ids), gradients(plain, ids), strict=True)
        error = max(float((a - b).abs().max()) for a, b in pairs)
        graphs = counters["stats"]["unique_graphs"]
        kept = gradients(compiled, ids)
        compiled.activation_checkpointing = True
        again = gradients(compiled, ids)
        compiled.eval()
        torch.testing.assert_close(compiled.nats(ids[:, :7], ids[:, :7]), plain.nats(ids[:, :7], ids[:, :7]))
        result[name] = {
            "error": error,
            "graphs": graphs,
            "recomputed_equal": all(torch.equal(a, b) for a, b in zip(again, kept, strict=True)),
            "compiled_later": counters["stats"]["unique_graphs"] - graphs,
        }
    torch.compiler.reset()
    plain, compiled = (make(FULL, torch.float64, 2) for _ in range(2))
    compiled.compile_blocks()
    counters.clear()
    errors, graphs = [], []
    for starts in ([0, 7, T, T + 20], [0, T], [0, 1, 2, T]):
        bounds = torch.tensor([*starts, 2 * T], dtype=torch.int32)
        pairs = zip(gradients(compiled, ids, bounds), gradients(plain, ids, bounds), strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs))
        graphs.append(counters["stats"]["unique_graphs"])
    result["documents"] = {"error": max(errors), "graphs": graphs}
    torch.compiler.reset()
    counters.clear()
    model = make(FULL, torch.float64, 2).requires_grad_(False)  # without gradients there is less to compile
    model.rotary(T)
    whole = torch.compile(GPT.hidden, fullgraph=True, dynamic=False)
    torch.testing.assert_close(whole(model, ids), model.hidden(ids), rtol=1e-10, atol=1e-10)
    whole(model, ids)
    result["whole"] = counters["stats"]["unique_graphs"]
    result["saved"] = saved_per_token(torch.bfloat16)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
