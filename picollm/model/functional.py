"""The few formulas of the model, with backward passes written out where autograd would keep or copy too much."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Elements of logits alive at once: small enough to stay in a last-level cache, large enough for full matmul speed.
LOGITS_PER_CHUNK = 1 << 21


def rms_norm(x: Float[Tensor, "... C"], eps: float) -> Float[Tensor, "... C"]:
    """x / rms(x) over the last axis, without a weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def relu_squared(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


def rotary_table(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "2 S 1 half"]:
    """Cosines and sines of position * theta^(-2i/D), computed in float64."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)[:, :, None]


def apply_rotary(x: Float[Tensor, "B T H D"], rotary: Float[Tensor, "2 #B T 1 half"]) -> Float[Tensor, "B T H D"]:
    """Rotate pairs (i, i + D/2) by +angle (Su et al. 2021, arXiv:2104.09864; half-split layout)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and loss by chunks; gradients are made while a chunk's probabilities are at hand.

    The logits of a batch are the largest tensor of a step by far (B*T*V); here no more than one chunk exists.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, scale: float, vocab_size: int) -> Tensor:
        w = weight[:vocab_size].to(x.dtype)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
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
            peak, where = logits.max(-1, keepdim=True)
            p = torch.softmax(logits, -1, dtype=exact)
            # log-sum-exp from the peak: its probability is at least 1/V, so the logarithm is safe.
            logsumexp = peak.to(exact) - p.gather(-1, where).log()
            nats = (logsumexp - logits.gather(-1, index).to(exact)).squeeze(-1)
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
