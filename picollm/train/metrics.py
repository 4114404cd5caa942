"""What a step cost: memory, speed, share of the peak."""

from __future__ import annotations

import psutil
import torch

from picollm.hardware import gpu_spec


def memory_gib(device: torch.device) -> float:
    """Peak allocated memory of a GPU, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of the device by its data sheet; None where no sheet says."""
    if device.type != "cuda":
        return None
    spec = gpu_spec(torch.cuda.get_device_name(device))
    return spec.bf16_flops if spec else None
