from __future__ import annotations

import pytest

from picollm.report.text import cell, count, listed, plain, table


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (999, "999"), (245_760, "245.8 k"), (1_052_676, "1.053 M"), (2e9, "2 B")]
)
def test_count(value: float | None, text: str) -> None:
    assert count(value) == text


def test_listed() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_plain_values() -> None:
    values = (None, True, 12, 12_345, 1e-6, ["a", 1], {"name": "x"}, "0123456789ab" + "c" * 52)
    assert [plain(v) for v in values] == ["–", "yes", "12", "12,345", "1e-06", "a, 1", "name x", "0123456789ab"]
    assert plain([]) == plain({}) == "–"


def test_text_cannot_leave_its_cell() -> None:
    assert cell("a | b\nc") == "a \\| b c"
    assert table(["x", "y"], [("1|2", "3")], right="1") == "| x | y |\n| --- | ---: |\n| 1\\|2 | 3 |"
