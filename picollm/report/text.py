"""Numbers and values as words: how the report writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

ABSENT = "–"
_HASH = re.compile(r"^[0-9a-f]{64}$")


def count(value: float | None) -> str:
    """A large number for reading: 1.05 M, 245.8 k."""
    if value is None:
        return ABSENT
    for divisor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= divisor:
            return f"{value / divisor:.4g} {letter}"
    return f"{value:,.0f}"


def decimal(value: float | None, digits: int) -> str:
    """A number with fixed digits; a dash where there is none."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def short_hash(sha256: str | None) -> str:
    """The first 12 digits, enough to tell files of a run apart."""
    return sha256[:12] if sha256 else ABSENT


def plain(value: Any) -> str:
    """Any JSON value in a table cell."""
    if value is None or value in ([], {}):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return short_hash(value) if _HASH.match(str(value)) else str(value)


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def cell(text: str) -> str:
    """Text that cannot leave its table cell or list line."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> str:
    """A Markdown table; `right` names the columns of numbers by index."""
    line = ["---:" if str(index) in right else "---" for index in range(len(head))]
    body = [[cell(text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), line, *body])
