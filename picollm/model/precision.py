"""Which matrices multiply in fp8, and their weights in 8 bits.

Scales are measured on the tensor itself (dynamic) or follow from an RMSNorm (fixed), so there is no history to keep:
a checkpoint is the same with and without fp8, and a resumed run goes on in the same bits. Weights are quantised once
per step instead of once per micro-step, in both layouts that the products need.
"""

from __future__ import annotations

import torch
from torch import nn

from picollm.errors import ConfigError
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

    Raises:
        ConfigError: the weights are on a GPU that cannot, such as an AMD GPU, whose 8-bit types are others.
    """
    count = 0
    _require_fp8(next(model.parameters()).device)
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
            parts = [part.weight for part in (layer, *layer.packed_with)]
            weight, inverse = quantize(torch.cat(parts) if len(parts) > 1 else parts[0], E4M3)
            layer.fp8_weight.copy_(weight)
            layer.fp8_weight_t.copy_(weight.t())
            layer.fp8_inverse.copy_(inverse)


def _require_fp8(device: torch.device) -> None:
    """Ask the device itself: a plan may have been made on another machine, and knows NVIDIA's GPUs only."""
    if device.type != "cuda":
        return
    if torch.version.hip:
        cause = "this torch is built for AMD GPUs, whose 8-bit types are not the ones that training uses"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        cause = f"its compute capability is {capability[0]}.{capability[1]}; 8-bit tensor cores begin at 8.9"
    else:
        return
    raise ConfigError(
        "training in 8 bits (`train.fp8`) is not possible on this GPU",
        cause=cause,
        hint="use `--set train.fp8=false`, in a new run where the stage has started with 8 bits",
    )


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
