"""Which attention kernel a run uses, and why: a pure function of the device, without torch.

The plan asks it before anything is made, with what is known of the machine; the worker asks it again with what torch
really has, and that answer counts.
"""

from __future__ import annotations

from dataclasses import dataclass

# Up to here scores in memory beat SDPA forward and backward on a CPU, in bfloat16 by half (bench/choices.py).
MATMUL_ATTENTION_MAX_T = 512


@dataclass(frozen=True)
class AttentionDevice:
    """What decides about kernels.

    Attributes:
        type: `cpu`, `cuda` or `mps`.
        capability: of a CUDA device, such as (9, 0).
        cudnn: version as in its headers, 91501 for 9.15.1; None where there is none.
        rocm: an AMD GPU behind torch's `cuda`.
        installed: of `flex`, `varlen`, `varlen_window` and `fa3`, those that can be used here.
    """

    type: str
    capability: tuple[int, int] | None = None
    cudnn: int | None = None
    rocm: bool = False
    installed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AttentionChoice:
    """A backend for layers that see everything, one for layers with a window (None where there are none), and why."""

    full: str
    window: str | None
    reason: str

    def __str__(self) -> str:
        return self.full if self.window in (None, self.full) else f"{self.full}, windows {self.window}"


def choose_attention(
    device: AttentionDevice, dtype: str, row: int, *, windows: bool = False, requested: str = "auto"
) -> AttentionChoice:
    """The kernels of a run.

    Args:
        dtype: compute type, as in recipes.
        row: tokens in a row, T.
        windows: some layers have a window.
        requested: `model.attention`.
    """
    if requested != "auto":
        return AttentionChoice(requested, requested if windows else None, "`model.attention` asks for it")
    if device.type == "cpu" and row <= MATMUL_ATTENTION_MAX_T:
        reason = f"on a CPU SDPA's backward is slower at {row} tokens a row"
        return AttentionChoice("matmul", "matmul" if windows else None, reason)
    reason = f"the fastest kernel for {dtype} at {row} tokens a row on this device"
    return AttentionChoice("sdpa", "sdpa" if windows else None, reason)
