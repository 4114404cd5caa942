"""Every distinct row once, in an order that depends on the rows alone, however they came."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picollm.data import spill
from picollm.data.spill import Spill, emptied, num_buckets, place_of
from picollm.errors import HostError

Rows = st.lists(st.one_of(st.sampled_from([b"", b"a", b"bb"]), st.binary(max_size=40)), max_size=60)


def empty(folder: Path, buckets: int, expected: int) -> list[tuple[bytes, int, tuple[int, int]]]:
    return [(bytes(row.data), row.times, row.notes) for row in emptied(folder, buckets, expected)]


@settings(deadline=None)
@given(rows=Rows, buckets=st.integers(1, 9), writers=st.integers(1, 3), buffer=st.integers(1, 3000), data=st.data())
def test_each_row_comes_once_in_the_one_order(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[bytes],
    buckets: int,
    writers: int,
    buffer: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("spill")
    shuffled = data.draw(st.permutations(rows))
    with mock.patch.object(spill, "BUFFER_BYTES", buffer), mock.patch.object(spill.os, "getpid") as getpid:
        for writer in range(writers):
            getpid.return_value = writer
            spilled = Spill(folder, buckets)
            for row in shuffled[writer::writers]:
                spilled.add(row, (len(row), 2**64 - 1))
            spilled.flush()
    found = empty(folder, buckets, len(rows))
    assert [row for row, _, _ in found] == sorted(set(rows), key=place_of)
    assert {row: times for row, times, _ in found} == Counter(rows)
    assert all(notes == (len(row), 2**64 - 1) for row, _, notes in found)
    assert list(folder.iterdir()) == []


def test_a_bucket_that_came_out_too_large_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"row {index} ".encode() * 50 for index in range(500)]
    monkeypatch.setattr(spill, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(spill, "LARGEST_BUCKET_BYTES", 80_000)
    loaded: list[int] = []
    read = spill._sorted
    monkeypatch.setattr(
        spill, "_sorted", lambda paths: (loaded.append(sum(p.stat().st_size for p in paths)), read(paths))[1]
    )
    spilled = Spill(tmp_path, 2)
    for row in rows + rows[:7]:
        spilled.add(row, (0, 0))
    spilled.flush()
    assert [row for row, _, _ in empty(tmp_path, 2, 507)] == sorted(rows, key=place_of)
    assert len(loaded) > 8
    assert max(loaded) < 40_000
    assert list(tmp_path.iterdir()) == []


def test_equal_rows_are_held_back_once(tmp_path: Path) -> None:
    spilled = Spill(tmp_path, 1)
    for _ in range(1000):
        spilled.add(b"x" * 1000, (0, 0))
    spilled.flush()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1200
    assert empty(tmp_path, 1, 1000) == [(b"x" * 1000, 1000, (0, 0))]


def test_rows_that_vanish_are_noticed(tmp_path: Path) -> None:
    spilled = Spill(tmp_path, 4)
    for index in range(100):
        spilled.add(b"%d" % index, (0, 0))
    spilled.flush()
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(HostError, match="changed while it was in use"):
        empty(tmp_path, 4, 100)


def test_a_folder_that_vanishes_is_noticed(tmp_path: Path) -> None:
    spilled = Spill(tmp_path / "gone", 1)
    spilled.add(b"x", (0, 0))
    with pytest.raises(HostError, match="cannot write"):
        spilled.flush()
    with pytest.raises(HostError, match="cannot read back"):
        empty(tmp_path / "gone", 1, 1)


def test_number_of_buckets() -> None:
    assert [num_buckets(size) for size in (0, 1, spill.BUCKET_BYTES, spill.BUCKET_BYTES + 1, 1 << 50)] == [
        1, 1, 1, 2, spill.MAX_BUCKETS,
    ]  # fmt: skip
