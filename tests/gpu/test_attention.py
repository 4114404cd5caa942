"""Every backend that this GPU has against float64, and the kernel that really runs."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from picollm.attention_choice import BACKENDS, attention_for, choose_attention, mismatch, obstacle
from picollm.config.model import Architecture
from picollm.model.attention import attention_device, causal_attention, kernel_that_ran, profiled_kernel
from picollm.model.gpt import GPT

pytestmark = pytest.mark.gpu
SCALE = 0.1
WINDOW = 256
# Of a matrix's gradient through five layers, by its norm; on a CPU the largest is 0.03.
BFLOAT16_ERROR = 0.06


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """softmax(scale q k^T) v with every score in memory."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    index = torch.arange(q.size(1), device=q.device)
    behind = index[:, None] - index
    visible = (behind >= 0) if window is None else (behind >= 0) & (behind <= window)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_gradients(backend: str, window: int | None, kv_heads: int, device: torch.device) -> None:
    why = obstacle(backend, attention_device(device), "bfloat16", 128, windows=window is not None)
    if why:
        pytest.skip(why)
    torch.manual_seed(0)
    # 1 000 is no multiple of any block.
    inputs = [
        torch.randn(2, 1000, heads, 128, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    ours = with_gradients(causal_attention(*inputs, scale=SCALE, backend=backend, window=window), inputs)
    for a, b in zip(ours, with_gradients(reference(*doubles, window), doubles), strict=True):
        # bfloat16 has 8 bits; a window that is off by one key is wrong by far more.
        assert float((a.double() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_choice_compiles_to_one_graph_and_stays_itself(window: int | None, device: torch.device) -> None:
    choice = choose_attention(attention_device(device), "bfloat16", 1024, windows=window is not None, head_size=128)
    backend = choice.full if window is None else choice.window

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, scale=SCALE, backend=backend, window=window)

    inputs = [torch.randn(2, 1024, 4, 128, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    ours, exact = with_gradients(compiled(*inputs), inputs), with_gradients(reference(*doubles, window), doubles)
    for a, b in zip(ours, exact, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("matmul", "sdpa")])
def test_the_kernel_of_a_backend_is_the_one_that_runs(backend: str, device: torch.device) -> None:
    if why := obstacle(backend, attention_device(device), "bfloat16", 128):
        pytest.skip(why)
    kernel = profiled_kernel(backend, (2, 2048, 6, 128), 6, torch.bfloat16, device)
    assert kernel is not None and mismatch(backend, kernel) is None, kernel


def test_on_hopper_cudnn_runs_and_the_note_says_so(device: torch.device) -> None:
    here = attention_device(device)
    if here.capability != (9, 0) or os.environ.get("LD_LIBRARY_PATH"):
        pytest.skip("it needs Hopper and torch's own libraries")
    arch = Architecture(
        arch="full", hidden_size=768, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=6, head_dim=128,
        intermediate_size=3072, vocab_size=512, max_position_embeddings=2048, rope_theta=100_000.0,
        sliding_window=512, window_pattern="SSSL",
    )  # fmt: skip
    choice = choose_attention(here, "bfloat16", 2048, windows=True, head_size=128)
    assert choice.full == "cudnn" and choice.slow is None
    note = kernel_that_ran(choice, arch, torch.bfloat16, device)
    assert note.startswith("attention kernels that ran: cudnn (`") and "was chosen" not in note


FULL = Architecture(
    arch="full", hidden_size=256, num_hidden_layers=5, num_attention_heads=2, num_key_value_heads=2, head_dim=128,
    intermediate_size=1024, vocab_size=512, max_position_embeddings=512, rope_theta=100_000.0, sliding_window=128,
    window_pattern="SSSL", final_logit_softcapping=15.0, value_embeddings=True, x0_scalars=True, smear=True,
    backout=True,
)  # fmt: skip


def model_on(device: torch.device, dtype: torch.dtype, **backends: str | None) -> GPT:
    """All features, weights that are not zero anywhere, masters in float32 or in `dtype` if that is wider."""
    model = GPT(FULL, compute_dtype=dtype, **backends)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape).normal_(0, 0.05, generator=generator))
    return (model.double() if dtype == torch.float64 else model).to(device)


@pytest.mark.parametrize("documents", [False, True])
def test_a_compiled_model_has_the_gradients_of_an_exact_one(documents: bool, device: torch.device) -> None:
    """The kernels that `auto` takes, in compiled blocks in bfloat16, against scores in memory in float64."""
    choice = attention_for(FULL, "bfloat16", attention_device(device), documents=documents)
    compiled = model_on(device, torch.bfloat16, backend=choice.full, window_backend=choice.window)
    compiled.compile_blocks()
    exact = model_on(device, torch.float64, backend="matmul")
    ids = torch.randint(0, 512, (4, 512), generator=torch.Generator().manual_seed(2)).to(device)
    bounds = torch.tensor([0, 200, 512, 1500, 4 * 512], dtype=torch.int32, device=device) if documents else None
    names, found = list(dict(exact.named_parameters())), []
    for model in (compiled, exact):
        loss = model.loss(ids, ids.roll(-1, 1), 1 / ids.numel(), bounds=bounds)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for name, a, b in zip(["loss", *names], *found, strict=True):
        if b.dim() != 1:  # those are sums of terms that cancel
            assert float((a.double() - b).norm() / b.norm()) < BFLOAT16_ERROR, name


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("backend", ["varlen", "fa3", "sdpa"])
def test_documents_are_kept_apart(backend: str, window: int | None, device: torch.device) -> None:
    """Attention by bounds against each document alone in float64."""
    if cause := obstacle(backend, attention_device(device), "bfloat16", 64, windows=window is not None, documents=True):
        pytest.skip(cause)
    B, T = 2, 1024
    generator = torch.Generator(device).manual_seed(0)
    exact = [torch.randn(B, T, 4, 64, generator=generator, device=device, dtype=torch.float64) for _ in range(3)]
    q, k, v = [x.bfloat16().requires_grad_() for x in exact]
    ends = [0, 300, 301, T, T + 700, 2 * T]
    bounds = torch.tensor(ends, dtype=torch.int32, device=device)
    out = causal_attention(q, k, v, scale=SCALE, backend=backend, window=window, bounds=bounds)
    flat = [x.detach().double().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    parts = [reference(*(x[None, start:end] for x in flat), window)[0] for start, end in pairwise(ends)]
    expected = with_gradients(torch.cat(parts).view(out.shape), flat)
    found = with_gradients(out, [q, k, v])
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double().flatten(), b.flatten(), atol=0.05, rtol=0.05)
