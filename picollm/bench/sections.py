"""The sections of the GPU probe, in their order. [no torch]"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """Seconds it may take before what is left of it is dropped, what it asks, and what to do when a row misses."""

    budget_s: float
    asks: str
    otherwise: str


SECTIONS: dict[str, Section] = {
    "identity": Section(
        30, "versions, and the attention kernel that runs by default",
        "put cuDNN first, and take a system cuDNN off LD_LIBRARY_PATH",
    ),
    "ceilings": Section(20, "the fastest copy and product", "read every other bound in proportion"),
    "gemm": Section(
        70, "the products of a step, in bf16 and fp8",
        "pack what wins 1 % of a step; take dW in bf16 where fp8 with its transposes is no faster",
    ),
    "attention": Section(
        90, "every attention kernel, full and with a window",
        "under 300 TFLOP/s: FA3; windows above 0.85: train with `model.window_pattern=L`",
    ),
    "pointwise": Section(80, "norm, rotation, relu^2 and loss", "look at the generated kernels; split reductions"),
    "d12": Section(100, "a d12 step, per block and as one graph", "compare the profile with docs/performance.md"),
    "d20": Section(90, "a d20 step of a million tokens", "fused relu^2; FA3"),
    "fp8": Section(160, "a d24 step in bf16 and fp8, and the loss of both", "keep only the parts that pay"),
    "profile": Section(30, "a d20 micro-step by kind of kernel", "find the copies: layouts of q, k and v"),
}  # fmt: skip
