"""The few formulas of the model, with backward passes written out where autograd would keep or copy too much."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def exact_type(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and probabilities: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    """Backward from the output alone: a fifth of the library's CPU time for norm and gradient (bench/choices.py)."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact_type(x.dtype))
        scale = (norm.square() / x.size(-1) + eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1) / y.size(-1)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


def rms_norm(x: Float[Tensor, "... C"], eps: float) -> Float[Tensor, "... C"]:
    """x / sqrt(mean(x^2) + eps) over the last axis, without a weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return _RMSNorm.apply(x, eps)


class _ReluSquared(torch.autograd.Function):
    """Keeps only its output, which the next matrix keeps anyway; the slope is 2 sqrt(output)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.clamp_min(0).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.sqrt().mul_(grad).mul_(2)


def relu_squared(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668)."""
    return _ReluSquared.apply(x)


def rotary_table(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "2 S 1 half"]:
    """Cosines and sines of position * theta^(-2i/D), computed in float64 (on the CPU: not every GPU has it)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)[:, :, None].to(device)


class _Rotary(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of the input is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


def apply_rotary(x: Float[Tensor, "B T H D"], rotary: Float[Tensor, "2 #B T 1 half"]) -> Float[Tensor, "B T H D"]:
    """Rotate pairs (i, i + D/2) by +angle (Su et al. 2021, arXiv:2104.09864; half-split layout)."""
    return _Rotary.apply(x, rotary[0], rotary[1])
