"""The few formulas of the model, with backward passes written out where autograd would keep or copy too much."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Elements of logits alive at once: small enough to stay in a last-level cache, large enough for full matmul speed.
LOGITS_PER_CHUNK = 1 << 22


class _RMSNorm(torch.autograd.Function):
    """Backward from the output alone: a fifth of the library's CPU time for norm and gradient (bench/choices.py)."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_exact(x.dtype))
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
    """Cosines and sines of position * theta^(-2i/D), computed in float64."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)[:, :, None]


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


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and probabilities: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and loss by chunks; gradients are made while a chunk's probabilities are at hand.

    The logits of a batch are the largest tensor of a step by far (B*T*V); here no more than one chunk exists.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, scale: float, vocab_size: int) -> Tensor:
        w = weight[:vocab_size].to(x.dtype)
        exact = _exact(x.dtype)
        rows = max(16, LOGITS_PER_CHUNK // vocab_size)
        needs_grad = ctx.needs_input_grad[0]
        if needs_grad:
            dx = torch.empty_like(x)
            dw = torch.zeros(weight.shape, dtype=exact, device=x.device)
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for start in range(0, x.size(0), rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            wanted = target >= 0
            index = target.clamp_min(0)[:, None]
            logits = part @ w.T
            p = torch.softmax(logits, -1, dtype=exact)
            nats = -p.gather(-1, index).squeeze(-1).log()
            if (tiny := nats > 60).any():  # so unlikely that float32 may have rounded it to 0
                hard = logits[tiny].to(exact)
                nats[tiny] = hard.logsumexp(-1) - hard.gather(-1, index[tiny]).squeeze(-1)
            total += nats.mul_(wanted).sum(dtype=torch.float64)
            if needs_grad:
                p.scatter_add_(-1, index, torch.full_like(index, -1, dtype=exact))
                dlogits = torch.empty_like(logits)
                torch.mul(p, (wanted * scale)[:, None], out=dlogits)
                torch.mm(dlogits, w, out=dx[start : start + rows])
                dw[:vocab_size] += dlogits.T @ part
        if needs_grad:
            ctx.save_for_backward(dx, dw)
        return (total * scale).to(exact)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        if float(grad) != 1.0:
            dx, dw = dx * grad.to(dx.dtype), dw * grad.to(dw.dtype)
        return dx, dw, None, None, None


def linear_cross_entropy(
    x: Float[Tensor, "N C"], weight: Float[Tensor, "W C"], targets: Int[Tensor, " N"], scale: float, vocab_size: int
) -> Float[Tensor, ""]:
    """Sum over rows with target >= 0 of -log softmax(x weight^T)[target], in nats, times `scale`.

    Only the first `vocab_size` rows of `weight` take part. Probabilities are float32 (float64 for float64 input).
    """
    return _LinearCrossEntropy.apply(x, weight, targets, scale, vocab_size)
