"""Products in 8-bit floats: e4m3 for inputs and weights, e5m2 for gradients, one scale for a whole tensor.

e4m3 has 3 bits of mantissa and reaches 448, e5m2 has 2 and reaches 57 344 (Micikevicius et al. 2022,
arXiv:2209.05433). A tensor x is stored as round(x * scale); the product multiplies the two inverse scales back in.
The master weights stay float32, and their gradient leaves the product as float32.

Letters: N tokens, I input width, O output width.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Below this largest value a tensor counts as zero: its scale, and the product of two scales, must be finite.
SMALLEST_AMAX = 2.0**-80
# cuBLASLt wants every side of an fp8 product to be a multiple of this.
ALIGNMENT = 16


def normed_scale(width: int) -> float:
    """Scale of an RMSNorm's output, for which no maximum has to be looked for: |x| <= sqrt(I), since mean(x^2) <= 1.

    The largest power of two that keeps sqrt(I) inside e4m3. A scale moves where numbers underflow and nothing else:
    here below 2^-9 of the rms, which is as good as a measured maximum.
    """
    return 2.0 ** math.floor(math.log2(torch.finfo(E4M3).max / math.sqrt(width)))


def quantize(
    x: Float[Tensor, "..."], dtype: torch.dtype, scale: float | None = None
) -> tuple[Tensor, Float[Tensor, ""]]:
    """`x` in 8 bits and the factor that undoes its scale.

    Zeros stay zero. A NaN stays NaN, and an infinity among numbers that are scaled by their maximum becomes NaN: a
    broken step must show in the loss.

    Args:
        scale: a scale that is known before; None takes the one that puts the largest |x| at the type's largest.
    """
    largest = torch.finfo(dtype).max
    if scale is None:
        amax = x.abs().amax().float().clamp_min(SMALLEST_AMAX)
        inverse = amax / largest
        scaled = x.float() * (largest / amax)
    else:
        inverse = torch.full((), 1 / scale, dtype=torch.float32, device=x.device)
        scaled = x.float() * scale
    # Older releases of torch make NaN of what is too large, newer ones the largest number.
    return scaled.clamp(-largest, largest).to(dtype), inverse


class _Product(torch.autograd.Function):
    """x W^T, dY W and dY^T x in 8 bits. `weights` are the masters behind the quantised W, only to get gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float | None, w: Tensor, w_t: Tensor, w_inverse: Tensor, *weights: Tensor):
        x8, x_inverse = quantize(x.flatten(0, -2), E4M3, scale)
        # Fast accumulation keeps fewer bits of partial sums. The forward pass bears that; gradients do not.
        y = torch._scaled_mm(
            x8, w.t(), scale_a=x_inverse, scale_b=w_inverse, out_dtype=x.dtype, use_fast_accum=True
        )  # (N, O)
        ctx.save_for_backward(x8, x_inverse, w_t, w_inverse)
        ctx.rows = [weight.size(0) for weight in weights]
        ctx.weight_dtype = weights[0].dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x8, x_inverse, w_t, w_inverse = ctx.saved_tensors
        g8, g_inverse = quantize(grad.flatten(0, -2), E5M2)
        dx = torch._scaled_mm(g8, w_t.t(), scale_a=g_inverse, scale_b=w_inverse, out_dtype=grad.dtype)  # (N, I)
        # The first factor of a product is stored by rows and the second by columns, so both are turned around here.
        g8_t, x8_t = g8.t().contiguous(), x8.t().contiguous()
        dw = torch._scaled_mm(g8_t, x8_t.t(), scale_a=g_inverse, scale_b=x_inverse, out_dtype=ctx.weight_dtype)
        return dx.view(*grad.shape[:-1], -1), None, None, None, None, *dw.split(ctx.rows)


def fp8_product(
    x: Float[Tensor, "... I"],
    scale: float | None,
    w: Float[Tensor, "O I"],
    w_t: Float[Tensor, "I O"],
    w_inverse: Float[Tensor, ""],
    *weights: Float[Tensor, "_ I"],
) -> Float[Tensor, "... O"]:
    """x W^T with everything in 8 bits, in the type of `x`; gradients go to `x` and to `weights`, of which W is made.

    Args:
        scale: of `x`, when it is known before.
        w, w_t, w_inverse: W in e4m3 in both layouts, and the factor that undoes its scale.
        weights: the master weights, stacked by rows.
    """
    return _Product.apply(x, scale, w, w_t, w_inverse, *weights)
