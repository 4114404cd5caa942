"""Where a GPU's time goes, by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from picollm.bench.timing import synchronize

# The first kind with a word in the kernel's name.
KINDS = (
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa", "flex_attention", "attention")),
    ("GEMM", ("gemm", "cutlass", "nvjet", "xmma", "addmm", "_mm_", "mm_", "gemv", "splitk")),
    ("loss", ("softmax", "logsumexp", "nll", "log_", "tanh")),
    ("embedding", ("embedding", "index", "gather", "scatter", "compute_grad_weight", "radixsort")),
    ("copy", ("memcpy", "memset", "direct_copy", "catarray", "contiguous", "clone")),
)
# Kernels that torch.compile generates bear the names of all operators around them: one that casts what goes into a
# product is `…_mm_…`, and one that also transposes is `…_clone_…`. Its products and attention are `triton_tem_…`.
FUSED = ("triton_poi_", "triton_red_", "triton_per_")
ARITHMETIC = ("add", "mul", "div", "clamp", "sum", "pow", "sqrt")


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name; what is none of the others is pointwise."""
    name = kernel.lower()
    excluded: set[str] = set()
    if name.startswith(FUSED):
        excluded = {"attention", "GEMM"} | ({"copy"} if any(word in name for word in ARITHMETIC) else set())
    return next((k for k, words in KINDS if k not in excluded and any(word in name for word in words)), "pointwise")


def kernel_times(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds by name of kernel (on a CPU, of operator) in one call, after one that warms up."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    call()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        call()
        synchronize(device)
    times = {}
    for event in trace.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds:
            times[event.key] = seconds
    return times


def shares(times: dict[str, float], wall_s: float) -> dict[str, float]:
    """Share of the wall time by kind, `idle` for what no kernel covers."""
    found: dict[str, float] = {}
    for name, seconds in times.items():
        found[kind_of(name)] = found.get(kind_of(name), 0.0) + seconds / wall_s
    return {**found, "idle": max(0.0, 1 - sum(found.values()))}
