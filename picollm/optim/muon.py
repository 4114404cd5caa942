"""Muon's mathematics: gradient and state of a stack of matrices -> what to take from the weights.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. The steps here, in order: Nesterov momentum; rows
equalised (MuonEq); Polar Express iteration (Amsel et al. 2025, arXiv:2505.16932); norm restored (Muon+); variance
per neuron evened out (NorMuon, Li et al. 2025, arXiv:2510.05491); cautious decay, which pulls only where it agrees
with the update (Liang et al. 2024, arXiv:2411.16085). All but the iteration itself scales whole rows or columns, so
norms are taken once and the factors multiplied as vectors: a step reads its matrices as few times as possible.

Letters: N matrices of a shape, R rows, C columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Five iterations of a degree-5 polynomial, tuned for singular values in [1e-3, 1] with a safety factor of 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.01
SECOND_MOMENT_BETA = 0.9
TINY = 1e-12  # below any norm of a gradient that is not zero; zero divided by it stays zero


def average(state: Tensor, value: Tensor, share: Tensor | float, keep: Bool[Tensor, ""] | None) -> Tensor:
    """Move a running average by `share` towards a value, in place; returns the new average.

    Args:
        keep: where False the state stays as it is, bit by bit, even when the value is not finite; None is a sure True.
    """
    if keep is None:
        return state.lerp_(value, share)
    new = torch.lerp(state, value, share)
    state.copy_(torch.where(keep, new, state))
    return new


def or_zero(update: Tensor, keep: Bool[Tensor, ""] | None) -> Tensor:
    """The update, or zeros where `keep` is False."""
    return update if keep is None else torch.where(keep, update, 0.0)


def equalize(x: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Rows brought to one norm (MuonEq), the matrix to one just under 1, where the polynomials converge."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    target = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / x.size(-2) ** 0.5
    factor = target / rows.clamp_min(TINY)
    whole = torch.linalg.vector_norm(rows * factor, dim=-2, keepdim=True)
    return x * (factor / (SAFETY * whole + 1e-6))


def orthogonalize(
    x: Float[Tensor, "N R C"], coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS
) -> Float[Tensor, "N R C"]:
    """About U V^T for each matrix's SVD U S V^T, for norms up to 1; zero stays zero. Works in the type of `x`."""
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x


def neuron_axis(rows: int, columns: int) -> int:
    """The dimension along which NorMuon averages: the shorter one."""
    return -1 if rows >= columns else -2


def neuron_factors(
    x: Float[Tensor, "N R C"], second_moment: Float[Tensor, "N ..."], keep: Bool[Tensor, ""] | None
) -> Float[Tensor, "N ..."]:
    """What to multiply neurons by: Frobenius norm sqrt(min(R, C)) (Muon+), variances evened out (NorMuon).

    `second_moment`, the running mean square of each neuron, is updated in place.
    """
    rows, columns = x.shape[-2:]
    goal = min(rows, columns) ** 0.5
    # Not vector_norm: over rows it takes ten times as long on a CPU (torch 2.13).
    norms = x.to(second_moment.dtype).square().sum(dim=neuron_axis(rows, columns), keepdim=True).sqrt()
    restore = goal / torch.linalg.vector_norm(norms, dim=(-2, -1), keepdim=True).clamp_min(TINY)
    mean_square = (norms * restore).square() / goal**2
    mean_square = average(second_moment, mean_square, 1 - SECOND_MOMENT_BETA, keep)
    even = restore * mean_square.clamp_min(1e-10).rsqrt()
    after = torch.linalg.vector_norm(norms * even, dim=(-2, -1), keepdim=True)
    return even * (goal / after.clamp_min(TINY))


def muon_update(
    grad: Float[Tensor, "N R C"],
    weight: Float[Tensor, "N R C"],
    momentum: Float[Tensor, "N R C"],
    second_moment: Float[Tensor, "N ..."],
    hyper: Float[Tensor, " 8"],
    keep: Bool[Tensor, ""] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "N R C"]:
    """What to subtract from the weights; momentum and second moment are updated in place.

    Args:
        hyper: momentum, rate, decay; a tensor, so that a compiled kernel outlives the schedule.
        keep: where False nothing changes and the update is zero, whatever the gradient holds; None is a sure True.
        dtype: type of the iteration's matrix products.
    """
    mu, rate, decay = hyper[0], hyper[1], hyper[2]
    rows, columns = weight.shape[-2:]
    rate = rate * max(1.0, rows / columns) ** 0.5
    ahead = torch.lerp(grad, average(momentum, grad, 1 - mu, keep), mu)  # Nesterov
    x = orthogonalize(equalize(ahead).to(dtype))
    update = x * (neuron_factors(x, second_moment, keep) * rate)
    # Strictly above: where the direction is zero, as for a zero gradient, nothing decays either.
    agree = torch.sign(update * weight).clamp_min_(0)
    return or_zero(update.addcmul_(agree.mul_(weight), decay * rate), keep)
