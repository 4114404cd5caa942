"""AdamW for what is not a matrix inside a block: its groups and its mathematics."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from picollm.optim.muon import average, or_zero

EPS = 1e-10


@dataclass(frozen=True)
class AdamGroup:
    """Hyperparameters of parameters; `rate` names the field `<rate>_lr` of Rates."""

    rate: str
    beta1: float
    beta2: float
    weight_decay: float

    def hyper(self, lr: float, count: int) -> list[float]:
        """What `adamw_update` needs at the `count`-th step (from 1); both bias corrections are folded in."""
        unbias = (1 - self.beta2**count) ** 0.5
        return [1 - self.beta1, 1 - self.beta2, lr * unbias / (1 - self.beta1**count), EPS * unbias,
                lr * self.weight_decay]  # fmt: skip


# Measured choices of nanochat's sweeps: slow second moments where gradients are sparse.
ADAM_GROUPS = {
    "lm_head": AdamGroup("unembedding", 0.8, 0.96, 0.01),
    "embed_tokens": AdamGroup("embedding", 0.8, 0.995, 0.001),
    "value_embeds": AdamGroup("value_embedding", 0.8, 0.995, 0.01),
    "resid_theta": AdamGroup("scalar", 0.8, 0.95, 0.0),
    "x0_lambdas": AdamGroup("x0", 0.96, 0.95, 0.0),
    "smear_gate": AdamGroup("gate", 0.8, 0.95, 0.0),
    "smear_lambda": AdamGroup("gate", 0.8, 0.95, 0.0),
    "backout_lambda": AdamGroup("gate", 0.8, 0.95, 0.0),
}


def group_name(parameter: str) -> str | None:
    """The AdamW group of a parameter; None for a matrix inside a block, which is Muon's."""
    first = parameter.split(".")[0]
    return first if first in ADAM_GROUPS else None


def adamw_update(
    grad: Float[Tensor, "*S"],
    weight: Float[Tensor, "*S"],
    m: Float[Tensor, "*S"],
    v: Float[Tensor, "*S"],
    hyper: Float[Tensor, " 8"],
    keep: Bool[Tensor, ""] | None,
) -> Float[Tensor, "*S"]:
    """What to subtract from the weight; both moments are updated in place (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        hyper: of `AdamGroup.hyper`.
        keep: where False nothing changes and the update is zero, whatever the gradient holds; None is a sure True.
    """
    forget1, forget2, rate, eps, decay = hyper[0], hyper[1], hyper[2], hyper[3], hyper[4]
    new_m = average(m, grad, forget1, keep)
    new_v = average(v, grad.square(), forget2, keep)
    update = (new_m / new_v.sqrt().add_(eps)).mul_(rate)
    return or_zero(update.addcmul_(weight, decay), keep)
