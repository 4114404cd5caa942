"""Which matrices multiply in fp8, and their weights in 8 bits.

Scales are measured on the tensor itself (dynamic) or follow from an RMSNorm (fixed), so there is no history to keep:
a checkpoint is the same with and without fp8, and a resumed run goes on in the same bits. Weights are quantised once
per step instead of once per micro-step, in both layouts that the products need.
"""

from __future__ import annotations

import torch
from torch import nn

from picollm.model.fp8 import ALIGNMENT, E4M3, quantize
from picollm.model.linear import Linear

# A narrower product costs less than quantising what goes into it.
MIN_SIDE = 128


def use_fp8(model: nn.Module) -> int:
    """Let the large matrices of `model` multiply in fp8 while it trains; in `model.eval()` nothing changes.

    A module that multiplies several matrices in one product names them in its attribute `packed`; they share one
    quantised weight. Embedding and head are no `Linear` and stay in the compute type. Call it when the weights are on
    their device, and `refresh_fp8` whenever they have changed.

    Returns:
        how many matrices that are.
    """
    count = 0
    for group in _groups(model):
        rows, columns = sum(layer.out_features for layer in group), group[0].in_features
        sides = [columns, *(layer.out_features for layer in group)]
        if any(side % ALIGNMENT for side in sides) or min(columns, rows) < MIN_SIDE:
            continue
        first, *others = group
        device = first.weight.device
        first.fp8_weight = torch.empty(rows, columns, dtype=E4M3, device=device)
        first.fp8_weight_t = torch.empty(columns, rows, dtype=E4M3, device=device)
        first.fp8_inverse = torch.empty((), dtype=torch.float32, device=device)
        first.packed_with = tuple(others)
        count += len(group)
    refresh_fp8(model)
    return count


@torch.no_grad()
def refresh_fp8(model: nn.Module) -> None:
    """Quantise the weights again, in place, after an optimizer step or after loading a checkpoint."""
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.fp8_weight is not None:
            whole = torch.cat([part.weight for part in (layer, *layer.packed_with)])
            weight, inverse = quantize(whole, E4M3)
            layer.fp8_weight.copy_(weight)
            layer.fp8_weight_t.copy_(weight.t())
            layer.fp8_inverse.copy_(inverse)


def _groups(model: nn.Module) -> list[tuple[Linear, ...]]:
    """Every `Linear`, alone or with those that are multiplied together with it."""
    groups = [
        tuple(getattr(module, name) for name in module.packed)
        for module in model.modules()
        if getattr(module, "packed", None)
    ]
    grouped = {id(layer) for group in groups for layer in group}
    groups += [(m,) for m in model.modules() if isinstance(m, Linear) and id(m) not in grouped]
    return groups
