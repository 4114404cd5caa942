from __future__ import annotations

import io

import pytest

from picollm.report.plots import draw_loss, smooth, token_unit


def points(count: int) -> list[dict]:
    return [{"step": i, "tokens": i * 1000, "loss": 5 / i} for i in range(1, count + 1)]


def size_of(png: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return image.size


def test_one_panel_per_stage() -> None:
    validation = {"pretrain": [{"step": 50, "tokens": 50_000, "name": "val_bpb", "value": 1.4}]}
    one = draw_loss({"pretrain": points(50)}, validation)
    two = draw_loss({"pretrain": points(50), "sft": points(80)}, validation)
    assert size_of(two)[0] > 1.5 * size_of(one)[0]
    assert draw_loss({"pretrain": points(50)}, validation) == one


@pytest.mark.parametrize("name", ["val_bpb", "val_loss"])
def test_holes_are_left_out(name: str) -> None:
    """A step that was not finite is null in the events; so may a validation be."""
    curve = [*points(3), {"step": 4, "tokens": 4000, "loss": None}]
    validation = [{"step": n, "tokens": n * 1000, "name": name, "value": value} for n, value in ((2, 1.0), (4, None))]
    assert draw_loss({"sft": curve}, {"sft": validation}).startswith(b"\x89PNG")


def test_validation_changes_the_picture() -> None:
    validation = {"sft": [{"step": 9, "tokens": 9_000, "name": "val_loss", "value": 1.0}]}
    assert draw_loss({"sft": points(9)}, validation) != draw_loss({"sft": points(9)}, {})


def test_smooth() -> None:
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smooth([1.0, 2.0]) == [1.0, 2.0]  # too short to smooth
    assert smooth([1.0] * 199 + [9.0])[-1] < 3  # one odd step does not end the curve
    assert smooth([]) == []
    line = [float(i) for i in range(200)]
    assert smooth(line)[:195] == pytest.approx(line[:195])  # a trend is kept: no lag, no dip at the start
    wiggle = smooth([float(i % 2) for i in range(200)])
    assert all(abs(value - 0.5) < 0.1 for value in wiggle[6:])


def test_token_unit() -> None:
    assert token_unit(245_760) == (1e3, "thousand tokens")
    assert token_unit(1_474_560) == (1e6, "million tokens")
    assert token_unit(0) == (1.0, "tokens")
