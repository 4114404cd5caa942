"""The loss scale falls at once, rises slowly, and stays within its bounds."""

from __future__ import annotations

import json

import pytest
import torch

from picollm.train import loss_scale
from picollm.train.loss_scale import CEILING, FLOOR, INITIAL, LossScale

GOOD, BAD = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> LossScale:
    """One that grows after three good steps."""
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    return LossScale(torch.device("cpu"))


def after(scale: LossScale, *steps: torch.Tensor) -> float:
    for finite in steps:
        scale.update(finite)
    return float(scale.scale)


def test_it_halves_at_once_and_doubles_after_many_good_steps(scale: LossScale) -> None:
    assert after(scale) == INITIAL
    assert after(scale, BAD) == INITIAL / 2
    assert after(scale, GOOD, GOOD) == INITIAL / 2
    assert after(scale, GOOD) == INITIAL
    assert after(scale, GOOD, GOOD, BAD) == INITIAL / 2  # counting starts anew
    assert after(scale, GOOD, GOOD) == INITIAL / 2
    assert after(scale, GOOD, GOOD, GOOD, GOOD) == INITIAL * 2


def test_it_has_a_floor_and_a_ceiling(scale: LossScale) -> None:
    assert after(scale, *[BAD] * 20) == FLOOR
    assert after(scale, *[GOOD] * 90) == CEILING


def test_its_state_is_json(scale: LossScale) -> None:
    after(scale, BAD, GOOD, GOOD)
    other = LossScale(torch.device("cpu"))
    other.restore(json.loads(json.dumps(scale.state())))
    assert other.state() == scale.state() == {"scale": INITIAL / 2, "good_steps": 2}
    assert after(scale, GOOD) == after(other, GOOD) == INITIAL
