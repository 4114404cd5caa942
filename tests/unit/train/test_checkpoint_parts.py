"""The index of a training state: whatever is in the file, it is refused or every row is in one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picollm.errors import IntegrityError, WorkerError
from picollm.train.checkpoint_parts import INDEX, Part, await_end, build_index, part_name, read_index

ROWS = st.lists(st.integers(-1, 6) | st.none(), max_size=3)
ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
PART = st.fixed_dictionaries({"file": st.sampled_from([part_name(r, 3) for r in range(3)]) | ANYTHING, "rows": ROWS})
ENTRY = st.fixed_dictionaries({"shape": ROWS | ANYTHING, "parts": st.lists(PART | ANYTHING, max_size=3)}) | ANYTHING


@settings(max_examples=300, deadline=None)
@given(index=st.dictionaries(st.text(max_size=2), ENTRY, max_size=2) | ANYTHING)
def test_an_index_is_refused_or_tiles_the_rows(tmp_path_factory, index) -> None:
    path = tmp_path_factory.getbasetemp() / "index"
    (path / "state").mkdir(parents=True, exist_ok=True)
    (path / INDEX).write_text(json.dumps(index))
    try:
        entries = read_index(path)
    except IntegrityError:
        return
    for entry in entries.values():
        covered = [row for first, end, _ in entry.parts for row in range(first, end)]
        assert covered == list(range(entry.num_rows))
        assert len({file for _, _, file in entry.parts}) == len(entry.parts)


@given(rows=st.integers(1, 40), world=st.integers(1, 8))
def test_what_ranks_write_is_read(tmp_path_factory, rows: int, world: int) -> None:
    share = -(-rows // world)
    parts = []
    for rank in reversed(range(world)):  # they come in any order
        first, end = min(rank * share, rows), min((rank + 1) * share, rows)
        where = {"a/m": {"shape": [rows, 2], "rows": [first, end]}} if first < end else {}
        parts.append(Part(part_name(rank, world), 1, "0" * 64, where))
    path: Path = tmp_path_factory.getbasetemp() / "written"
    (path / "state").mkdir(parents=True, exist_ok=True)
    (path / INDEX).write_text(json.dumps(build_index(parts)))
    entry = read_index(path)["a/m"]
    assert entry.shape == (rows, 2) and len(entry.parts) == -(-rows // share)
    assert all(file == part_name(first // share, world) for first, _, file in entry.parts)


def test_a_rank_that_was_asked_to_end_does_not_wait_for_a_dead_rank_0(tmp_path: Path) -> None:
    looks = iter([False, False, True])
    await_end(tmp_path, timeout_s=60, stopped=lambda: next(looks))
    assert next(looks, None) is None
    with pytest.raises(WorkerError, match="rank 0 has not completed"):
        await_end(tmp_path, timeout_s=0)
