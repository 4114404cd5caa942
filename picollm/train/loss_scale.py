"""Dynamic loss scaling for float16, whose smallest numbers are larger than many gradients.

The loss is multiplied before backward and the gradients divided after it (Micikevicius et al. 2018, arXiv:1710.03740).
Everything stays on the device: no step waits for the host to learn whether the one before overflowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL = 2.0**16
FLOOR, CEILING = 1.0, 2.0**24
GROW_AFTER = 2000  # good steps in a row


class LossScale:
    """The factor on the loss: halved by every step that is not finite, doubled after many that are.

    Attributes:
        scale: 0-D float32, a power of two.
        good_steps: 0-D int64, finite steps since it last changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.tensor(INITIAL, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Take a step's outcome in.

        Args:
            finite: 0-D bool, on the device.
        """
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= GROW_AFTER
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(FLOOR, CEILING)
        self.good_steps.copy_(torch.where(grow, 0, good))

    def state(self) -> dict[str, float | int]:
        """As JSON, for a checkpoint's meta; waits for the device."""
        return {"scale": float(self.scale), "good_steps": int(self.good_steps)}

    def restore(self, state: dict[str, float | int]) -> None:
        """Go on from what `state` gave."""
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
