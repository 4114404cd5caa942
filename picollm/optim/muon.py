"""One optimizer: Muon for the matrices inside blocks, AdamW for embedding, head and scalars.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix. The steps here, in order: Nesterov momentum; rows
equalised (MuonEq); Polar Express iteration (Amsel et al. 2025, arXiv:2505.16932); norm restored (Muon+); variance
per neuron evened out (NorMuon, Li et al. 2025, arXiv:2510.05491); cautious decay, which pulls only where it agrees
with the update (Liang et al. 2024, arXiv:2411.16085). Matrices of one shape are updated as one stack.

Letters: N matrices of a shape, R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from picollm.config.recipe import Rates, Schedule
from picollm.optim import schedules

# Five iterations of a degree-5 polynomial, tuned for singular values in [1e-3, 1] with a safety factor of 1.01.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SECOND_MOMENT_BETA = 0.9
ADAM_EPS = 1e-10


@dataclass(frozen=True)
class AdamGroup:
    """Hyperparameters of the AdamW part, by parameter name."""

    beta1: float
    beta2: float
    weight_decay: float


# Measured choices of nanochat's sweeps: slow second moments where gradients are sparse.
ADAM_GROUPS = {
    "embed_tokens": AdamGroup(0.8, 0.995, 0.001),
    "lm_head": AdamGroup(0.8, 0.96, 0.01),
    "resid_theta": AdamGroup(0.8, 0.95, 0.0),
}


def orthogonalize(x: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """An approximation of U V^T for each matrix's SVD U S V^T; zero stays zero. Works in the type of `x`."""
    tall = x.size(-2) > x.size(-1)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    if tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_direction(
    update: Float[Tensor, "N R C"], second_moment: Float[Tensor, "N ..."], dtype: torch.dtype
) -> Float[Tensor, "N R C"]:
    """The step's direction from Nesterov momentum; `second_moment` (per row or column) is updated in place.

    Args:
        dtype: type of the iteration's matrix products.
    """
    rows, columns = update.shape[-2:]
    row_norm = update.norm(dim=-1, keepdim=True)
    target = update.norm(dim=(-2, -1), keepdim=True) / rows**0.5
    u = update * (target / row_norm.clamp_min(1e-12))
    u = orthogonalize(u.to(dtype)).to(update.dtype)
    u = u * (min(rows, columns) ** 0.5 / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12))
    before = u.norm(dim=(-2, -1), keepdim=True)
    per_neuron = u.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    second_moment.lerp_(per_neuron, 1 - SECOND_MOMENT_BETA)
    u = u * second_moment.clamp_min(1e-10).rsqrt()
    return u * (before / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12))


class MuonAdamW:
    """Updates a GPT in place. Its state is tensors by parameter name, whatever the number of ranks.

    Matrices of one shape become slices of one stack (their `.data` is replaced by views), so that a step is a few
    batched products instead of hundreds of small ones.

    Args:
        dtype: type of the orthogonalisation; bfloat16 is enough (the iteration is self-correcting).
    """

    def __init__(self, model: nn.Module, rates: Rates, schedule: Schedule, steps: int, *, dtype: torch.dtype) -> None:
        self.rates, self.schedule, self.steps, self.dtype = rates, schedule, steps, dtype
        self.adam = {name: p for name, p in model.named_parameters() if name in ADAM_GROUPS}
        self.state: dict[str, dict[str, Tensor]] = {
            name: {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for name, p in self.adam.items()
        }
        by_shape: dict[torch.Size, list[str]] = {}
        matrices = {name: p for name, p in model.named_parameters() if name not in ADAM_GROUPS}
        for name, p in matrices.items():
            assert p.dim() == 2, name
            by_shape.setdefault(p.shape, []).append(name)
        self.stacks: list[dict[str, Tensor]] = []
        self.members: list[list[nn.Parameter]] = []
        for (rows, columns), names in by_shape.items():
            params = [matrices[name] for name in names]
            stack = torch.stack([p.data for p in params])
            momentum = torch.zeros_like(stack)
            reduced = (len(names), rows, 1) if rows >= columns else (len(names), 1, columns)
            second = torch.zeros(reduced, dtype=stack.dtype, device=stack.device)
            for i, (name, p) in enumerate(zip(names, params, strict=True)):
                p.data = stack[i]
                self.state[name] = {"momentum": momentum[i], "second_moment": second[i]}
            self.stacks.append({"weight": stack, "momentum": momentum, "second_moment": second})
            self.members.append(params)

    def rates_at(self, step: int) -> dict[str, float]:
        """Learning rate by group at a step, for the log."""
        factor = schedules.lr_factor(step, self.steps, self.schedule)
        return {
            name: getattr(self.rates, f"{name}_lr") * factor
            for name in ("matrix", "embedding", "unembedding", "scalar")
        }

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Apply the gradients of step number `step` (from 0) and drop them."""
        lr = self.rates_at(step)
        decay = self.rates.weight_decay * schedules.decay_factor(step, self.steps)
        mu = schedules.momentum(step, self.steps, self.schedule)
        for stack, params in zip(self.stacks, self.members, strict=True):
            grad = torch.stack([p.grad for p in params])
            stack["momentum"].lerp_(grad, 1 - mu)
            direction = muon_direction(grad.lerp_(stack["momentum"], mu), stack["second_moment"], self.dtype)
            weight = stack["weight"]
            rows, columns = weight.shape[-2:]
            rate = lr["matrix"] * max(1.0, rows / columns) ** 0.5
            if decay:
                direction += decay * weight * (direction * weight >= 0)
            weight.sub_(direction, alpha=rate)
        for name, p in self.adam.items():
            group = {"embed_tokens": "embedding", "lm_head": "unembedding", "resid_theta": "scalar"}[name]
            self._adamw(p, self.state[name], lr[group], ADAM_GROUPS[name], step + 1)
        self.zero_grad()

    @staticmethod
    def _adamw(p: nn.Parameter, state: dict[str, Tensor], lr: float, group: AdamGroup, count: int) -> None:
        """Decoupled decay and bias-corrected moments (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
        p.mul_(1 - lr * group.weight_decay)
        state["m"].lerp_(p.grad, 1 - group.beta1)
        state["v"].mul_(group.beta2).addcmul_(p.grad, p.grad, value=1 - group.beta2)
        scale = (state["v"] / (1 - group.beta2**count)).sqrt_().add_(ADAM_EPS)
        p.addcdiv_(state["m"], scale, value=-lr / (1 - group.beta1**count))

    def zero_grad(self) -> None:
        for params in (*self.members, self.adam.values()):
            for p in params:
                p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`{parameter name}/{state name}` -> tensor."""
        return {f"{name}/{key}": value for name, state in sorted(self.state.items()) for key, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Copy a state of the same parameters.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, value in self.state_dict().items():
            value.copy_(saved[name])
