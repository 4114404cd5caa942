from __future__ import annotations

import pytest

from picollm.report.markdown import count, duration


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (999, "999"), (245_760, "245.8 k"), (1_052_676, "1.053 M"), (2e9, "2 B")]
)
def test_count(value: float | None, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (4.26, "4.26 s"), (59.7, "59.7 s"), (185.2, "3 min 05 s"), (7_805, "2 h 10 min")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
