from __future__ import annotations

import pytest

from picollm.units import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (4.26, "4.26 s"),
        (59.4, "59.4 s"),
        (59.7, "1 min 00 s"),
        (185.2, "3 min 05 s"),
        (3_599.6, "1 h 00 min"),
        (7_805, "2 h 10 min"),
        (360_000, "4 days 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (1536, "1.5 KiB"),
        (3.4 * 2**20, "3.4 MiB"),
        (780 * 2**20, "780 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2_048 * 2**30, "2,048 GiB"),
    ],
)
def test_size(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text
