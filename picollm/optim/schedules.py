"""Learning rate, momentum and weight decay as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from picollm.config.recipe import Schedule


def lr_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Share of the peak rate at a step: linear warm-up, flat, linear warm-down to `final_lr_fraction`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    remaining = steps - step
    if remaining >= schedule.warmdown_steps:
        return 1.0
    share = remaining / schedule.warmdown_steps
    return share + (1.0 - share) * schedule.final_lr_fraction


def momentum(step: int, steps: int, schedule: Schedule) -> float:
    """Muon's momentum: linear rise to the peak, then linear fall over the warm-down."""
    rise = min(1.0, step / schedule.momentum_ramp_steps) if schedule.momentum_ramp_steps else 1.0
    value = schedule.momentum_start + rise * (schedule.momentum_peak - schedule.momentum_start)
    if schedule.warmdown_steps and (into := step - (steps - schedule.warmdown_steps)) > 0:
        fall = schedule.momentum_peak - schedule.momentum_end
        value = min(value, schedule.momentum_peak - fall * into / schedule.warmdown_steps)
    return value


def decay_factor(step: int, steps: int) -> float:
    """Share of the weight decay at a step: half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))
