"""Products with weights: the one place that decides the type in which a matrix multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from picollm.model.fp8 import ALIGNMENT, fp8_product, normed_scale


class Linear(nn.Linear):
    """A matrix without bias whose float32 master weight is cast to the activations' type.

    Explicit casts instead of autocast: the type of every product is the type of its input. After `precision.use_fp8`
    the large ones multiply in 8 bits while they train.

    Args:
        normed_input: the input comes out of an RMSNorm, so fp8 knows its scale (`fp8.normed_scale`).
    """

    def __init__(self, in_features: int, out_features: int, *, normed_input: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.input_scale = normed_scale(in_features) if normed_input else None
        # The weight in 8 bits by rows and by columns, with the layers that follow it in the same product. None of it
        # is state: `precision.refresh_fp8` makes it from the masters.
        self.packed_with: tuple[Linear, ...] = ()
        for name in ("fp8_weight", "fp8_weight_t", "fp8_inverse"):
            self.register_buffer(name, None, persistent=False)

    def reset_parameters(self) -> None:
        """GPT.init_weights decides; nothing here."""

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return packed_linear(x, (self,))


def packed_linear(x: Float[Tensor, "... I"], layers: Sequence[Linear]) -> Float[Tensor, "... O"]:
    """The outputs of several matrices side by side, in one product: narrow matrices waste a matrix unit.

    The weights stay apart for Muon and exports.
    """
    first = layers[0]
    if first.training and first.fp8_weight is not None and x.numel() // x.size(-1) % ALIGNMENT == 0:
        assert len(layers) == 1 + len(first.packed_with), "quantised with other matrices than it is multiplied with"
        masters = [layer.weight for layer in layers]
        return fp8_product(x, first.input_scale, first.fp8_weight, first.fp8_weight_t, first.fp8_inverse, *masters)
    weight = first.weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight.to(x.dtype))
