"""Products with weights: the one place that decides the type in which a matrix multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """A matrix without bias whose float32 master weight is cast to the activations' type.

    Explicit casts instead of autocast: the type of every product is the type of its input.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """GPT.init_weights decides; nothing here."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return F.linear(x, self.weight.to(x.dtype))


def packed_linear(x: Float[Tensor, "... I"], layers: Sequence[Linear]) -> Float[Tensor, "... O"]:
    """The outputs of several matrices side by side, in one product: narrow matrices waste a matrix unit.

    The weights stay apart for Muon and exports.
    """
    return F.linear(x, torch.cat([layer.weight for layer in layers]).to(x.dtype))
