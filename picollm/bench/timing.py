"""How long a call takes on a device: CUDA events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

# Beyond twice the L2 cache of any GPU in the table (H200: 60 MB), so that no call finds its input there.
ROTATE_BYTES = 256 * 2**20
MAX_COPIES = 16


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_of(num_bytes: int) -> int:
    """How many buffers of this size to take turns with."""
    return min(MAX_COPIES, max(1, math.ceil(ROTATE_BYTES / num_bytes)))


def median_s(call: Callable[[int], object], device: torch.device, *, repeats: int = 20, warmup: int = 5) -> float:
    """Median seconds of `call(i)`, i counting from 0, after calls that compile, tune and load kernels.

    On a GPU the calls are queued one after the other and timed by the device, so the host costs nothing unless it
    cannot keep up.
    """
    for i in range(warmup):
        call(i)
    synchronize(device)
    if device.type != "cuda":
        seconds = []
        for i in range(repeats):
            started = time.perf_counter()
            call(warmup + i)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (before, after) in enumerate(marks):
        before.record()
        call(warmup + i)
        after.record()
    synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3
