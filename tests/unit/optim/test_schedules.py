from __future__ import annotations

import pytest

from picollm.config.recipe import Schedule
from picollm.optim.schedules import decay_factor, lr_factor, momentum

SCHEDULE = Schedule(
    warmup_steps=10, warmdown_steps=50, final_lr_fraction=0.1, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=20,
)  # fmt: skip


def test_rate_rises_stays_and_falls() -> None:
    rates = [lr_factor(step, 100, SCHEDULE) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5 + 0.5 * 0.1)
    assert rates == [*sorted(rates[:10]), *rates[10:51], *sorted(rates[51:], reverse=True)]
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 50)


def test_momentum_ramps_up_then_down() -> None:
    values = [momentum(step, 100, SCHEDULE) for step in range(100)]
    assert values[0] == 0.85
    assert values[20:51] == [pytest.approx(0.95)] * 31
    assert values[99] == pytest.approx(0.95 - 0.05 * 49 / 50)


def test_nothing_divides_by_zero_in_the_shortest_run() -> None:
    shortest = SCHEDULE.model_copy(update={"warmup_steps": 0, "warmdown_steps": 0, "momentum_ramp_steps": 0})
    assert lr_factor(0, 1, shortest) == 1.0
    assert momentum(0, 1, shortest) == 0.95
    assert decay_factor(0, 1) == 1.0
