"""What a step cost: memory, speed, share of the peak."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from picollm.gpu_specs import gpu_spec


@dataclass(frozen=True)
class Memory:
    """Of a GPU: the most that tensors held, and what the allocator took for them. Of a CPU: the process, twice."""

    allocated_gib: float
    reserved_gib: float


def memory(device: torch.device) -> Memory:
    """Peak memory of a GPU since the process began, or resident memory of this process now."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        peaks = (psutil.Process().memory_info().rss,) * 2
    return Memory(*(peak / 2**30 for peak in peaks))


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Dense FLOP/s of the device in a compute type by its data sheet; None where no sheet says.

    Runs in fp8 are counted against the bfloat16 peak, by convention: only a part of their products is in fp8.
    """
    if device.type != "cuda":
        return None
    spec = gpu_spec(torch.cuda.get_device_name(device))
    return spec.peak_flops(dtype) if spec else None


@dataclass(frozen=True)
class Throughput:
    """Turns a step's duration into the figures of its event.

    Attributes:
        step_tokens: of all ranks.
        step_flops: of all ranks, by `scaling.flops_per_token`.
        peak_flops: of one rank's device; None where it is not known.
    """

    step_tokens: int
    step_flops: float
    peak_flops: float | None
    world: int

    def tokens_per_s(self, dt_s: float) -> float:
        return self.step_tokens / dt_s

    def mfu(self, dt_s: float) -> float | None:
        """Share of the peak that the model's FLOPs make up (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return self.step_flops / dt_s / (self.peak_flops * self.world) if self.peak_flops else None
