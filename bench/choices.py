"""Why the CPU path is written as it is: each choice beside its alternative, in one process, on one thread.

    OMP_NUM_THREADS=1 python bench/choices.py

Every figure is the median CPU time of forward and backward in milliseconds. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from picollm.config.model import short_window
from picollm.model.attention import causal_attention
from picollm.model.functional import apply_rotary, relu_squared, rms_norm, rotary_table
from picollm.model.loss import linear_cross_entropy
from picollm.worker import keep_freed_memory

ROWS, T, HEADS, HEAD_DIM, HIDDEN, VOCAB = 8, 512, 4, 64, 256, 8192


def cpu_ms(function: Callable[[], object], repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(1000 * (time.process_time() - start))
    return round(statistics.median(times), 2)


def step(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of a function of tensors."""
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> object:
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def beside(ours: Callable[[], object], alternative: Callable[[], object]) -> dict[str, float]:
    a, b = cpu_ms(ours), cpu_ms(alternative)
    return {"ours_ms": a, "alternative_ms": b, "ratio": round(b / a, 2)}


def attention(dtype: torch.dtype, length: int, window: int | None = None) -> dict[str, float]:
    """Scores in memory beside SDPA (with a window: both skip blocks of keys that none sees)."""
    rows = ROWS * T // length
    qkv = [torch.randn(rows, length, HEADS, HEAD_DIM, dtype=dtype) for _ in range(3)]
    both = (
        step(lambda q, k, v, b=backend: causal_attention(q, k, v, scale=0.1, backend=b, window=window), *qkv)
        for backend in ("matmul", "sdpa")
    )
    return beside(*both)


def allocator() -> dict[str, float]:
    """Whole training-like steps in fresh processes with and without `picollm.worker`'s mallopt."""
    code = (
        "import time, torch; torch.set_num_threads(1)\n"
        "if {keep}:\n from picollm.worker import keep_freed_memory; keep_freed_memory()\n"
        "x = torch.randn(4096, 256, requires_grad=True); w = torch.randn(1024, 256, requires_grad=True)\n"
        "def run():\n for _ in range(20): (x @ w.T).relu().square().sum().backward()\n"
        "run(); start = time.process_time(); run(); print(1000 * (time.process_time() - start))"
    )

    def cost(keep: bool) -> float:
        done = subprocess.run(
            [sys.executable, "-c", code.format(keep=keep)], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    ours, alternative = (statistics.median(cost(keep) for _ in range(3)) for keep in (True, False))
    return {"ours_ms": round(ours, 1), "alternative_ms": round(alternative, 1), "ratio": round(alternative / ours, 2)}


def main() -> None:
    keep_freed_memory()  # as in a worker
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, object] = {"torch": torch.__version__, "allocator": allocator()}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        hidden = torch.randn(ROWS, T, HIDDEN, dtype=dtype)
        wide = torch.randn(ROWS, T, 4 * HIDDEN, dtype=dtype)
        heads = torch.randn(ROWS, T, 2 * HEADS, HEAD_DIM, dtype=dtype)
        table = rotary_table(T, HEAD_DIM, 1e5, dtype, torch.device("cpu"))[:, None]
        cos, sin = table

        def plain_rotary(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        weight = torch.randn(VOCAB, HIDDEN)
        targets = torch.randint(0, VOCAB, (ROWS * T,))

        def plain_loss(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor = targets) -> torch.Tensor:
            return F.cross_entropy((x @ w.to(x.dtype).T).float(), targets, reduction="sum")

        flat = hidden.detach().clone().view(-1, HIDDEN)
        result[name] = {
            "rms_norm": beside(
                step(lambda x: rms_norm(x, 1e-6), hidden), step(lambda x: F.rms_norm(x, (HIDDEN,), eps=1e-6), hidden)
            ),
            "relu_squared": beside(step(relu_squared, wide), step(lambda x: F.relu(x).square(), wide)),
            "rotary": beside(step(lambda x, t=table: apply_rotary(x, t), heads), step(plain_rotary, heads)),
            "head_and_loss": beside(
                step(lambda x, w, t=targets: linear_cross_entropy(x, w, t, 1.0, VOCAB), flat, weight),
                step(plain_loss, flat, weight),
            ),
            **{f"matmul_attention_T{length}": attention(dtype, length) for length in (128, 256, 512, 1024, 2048)},
            **{
                f"matmul_attention_T{length}_W{window}": attention(dtype, length, window)
                for length in (512, 1024, 2048)
                if (window := short_window(length))
            },
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
