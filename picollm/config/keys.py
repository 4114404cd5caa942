"""Dotted keys: `train.steps` for the value at {"train": {"steps": …}}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Tables whose keys are names, which may hold dots: each is one value.
NAMED_TABLES = frozenset({"data.mix"})


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted key, value)` of every leaf; lists, empty tables and NAMED_TABLES are leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in NAMED_TABLES:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_named(key: str) -> tuple[str, str | None]:
    """`data.mix.peps` -> (`data.mix`, `peps`); a key outside NAMED_TABLES comes back whole, with None."""
    table = next((table for table in NAMED_TABLES if key.startswith(f"{table}.")), None)
    return (key, None) if table is None else (table, key.removeprefix(f"{table}."))


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: dotted keys -> a tree of tables."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *tables, leaf = key.split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
        node[leaf] = value
    return tree
