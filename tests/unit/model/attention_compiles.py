"""Attention inside a compiled function, started by test_attention.py in a process without the checks of shapes, which
the tracer cannot follow. No code is generated, which takes minutes: the tracer must follow and lose nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from picollm.model import gpu_attention
from picollm.model.attention import causal_attention

SCALE = 0.3


def block(q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None) -> Tensor:
    return 2 * causal_attention(q, k, v, scale=SCALE, backend=backend, window=window)


def results(run: Callable[..., Tensor], inputs: list[Tensor], backend: str, window: int | None) -> list[Tensor]:
    """Output, and gradients where the inputs ask for them."""
    out = run(*inputs, backend, window)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))] if out.requires_grad else [out]


def main() -> None:
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    fixed = [torch.randn(2, 300, heads, 16, generator=generator) for heads in (4, 2, 2)]
    trained = [x.clone().requires_grad_() for x in fixed]
    # A CPU's flash kernel serves `flash`, and `cudnn` second; flex has no backward pass on CPUs.
    cases = [*itertools.product(("matmul", "sdpa", "flex"), (None, 100)), ("flash", None), ("cudnn", None)]
    for backend, window in cases:
        inputs = fixed if backend == "flex" else trained
        ours, plain = (results(run, inputs, name, window) for run, name in ((compiled, backend), (block, "matmul")))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == len(cases), f"{graphs} graphs for {len(cases)} cases"
    # Layers of one kind share a mask, and what was made while compiling serves the next compilation.
    assert set(gpu_attention._MASKS) == {(300, window, fixed[0].device) for window in (None, 100)}
    for backend, window in cases:
        compiled(*(fixed if backend == "flex" else trained), backend, window)
    assert counters["stats"]["unique_graphs"] == graphs, "a second layer of a kind was compiled again"


if __name__ == "__main__":
    main()
