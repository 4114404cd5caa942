"""Rows of any number -> each distinct row once, in a permutation of all of them, in bounded memory.

A row's place is a salted hash of its bytes. Rows are spilled to buckets by the first bits of it; each bucket is then
read, sorted by the whole hash and emptied. Equal rows meet in one bucket side by side, so duplicates fall out, and the
order is a global permutation that does not depend on how the input was ordered or split over processes.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from picollm.errors import HostError
from picollm.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

SALT = b"picollm import order 1\0"
# Bytes that one bucket should hold: about what the second pass keeps in memory at a time.
BUCKET_BYTES = 48 << 20
# A bucket that came out larger, because a packed file held more than was guessed, is split before it is read.
LARGEST_BUCKET_BYTES = 4 * BUCKET_BYTES
MAX_BUCKETS = 4096
# Bytes of rows held back before they are appended to their buckets, over all of them.
BUFFER_BYTES = 32 << 20
_OBJECT_BYTES = 450  # what Python adds to a row that is held back: the row, its entry, a dictionary's slot
# A bucket file is a chain of blocks: the number of rows and of their bytes, an entry for each row, then the rows.
_BLOCK = struct.Struct("<QQ")
# Place (two numbers), size in bytes, how often, and the caller's two numbers.
_ENTRY = struct.Struct("<6Q")
_FILE = re.compile(r"(\d+)-\d+\.rows")


class SpilledRow(NamedTuple):
    """A distinct row.

    Attributes:
        times: how often it came.
        notes: the two numbers that were given with it.
    """

    data: memoryview
    times: int
    notes: tuple[int, int]


def num_buckets(input_bytes: int) -> int:
    """Buckets for an input of so many bytes."""
    return min(MAX_BUCKETS, max(1, -(-input_bytes // BUCKET_BYTES)))


def place_of(row: bytes) -> tuple[int, int]:
    """Where a row stands in the permutation: 128 bits, equal for equal rows only."""
    digest = hashlib.blake2b(SALT, digest_size=16)
    digest.update(row)  # not SALT + row: the row may be large
    high, low = struct.unpack(">QQ", digest.digest())
    return high, low


class Spill:
    """One process's half of the work: rows into bucket files of its own.

    Args:
        folder: shared by all processes.
        buckets: the same for all processes.
    """

    def __init__(self, folder: Path, buckets: int) -> None:
        self._folder, self._buckets = folder, buckets
        # A row held back under its place: the row, how often it came, the notes.
        self._held: dict[tuple[int, int], tuple[bytes, int, tuple[int, int]]] = {}
        self._held_bytes = 0

    def add(self, row: bytes, notes: tuple[int, int]) -> None:
        """Keep a row, with two numbers of 64 bits about it."""
        self._add(place_of(row), row, 1, notes)

    def _add(self, place: tuple[int, int], row: bytes, times: int, notes: tuple[int, int]) -> None:
        if (known := self._held.get(place)) is not None:
            self._held[place] = (known[0], known[1] + times, notes)
            return
        self._held[place] = (row, times, notes)
        self._held_bytes += len(row) + _OBJECT_BYTES
        if self._held_bytes >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is held to the bucket files.

        Raises:
            HostError: the disk is full.
        """
        by_bucket: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for place in self._held:
            by_bucket[place[0] * self._buckets >> 64].append(place)
        for bucket, places in by_bucket.items():
            entries, rows, size = [], [], 0
            for place in places:
                row, times, notes = self._held[place]
                entries.append(_ENTRY.pack(*place, len(row), times, *notes))
                rows.append(row)
                size += len(row)
            path = self._folder / f"{bucket}-{os.getpid()}.rows"
            with disk_errors(path), open(path, "ab") as file:
                file.write(_BLOCK.pack(len(rows), size))
                file.writelines(entries)
                file.writelines(rows)
        self._held = {}
        self._held_bytes = 0


def emptied(folder: Path, buckets: int, expected: int) -> Iterator[SpilledRow]:
    """Every distinct row in order of its place; bucket files are removed as they are read.

    Args:
        expected: rows that were spilled, duplicates included.

    Raises:
        HostError: the files cannot be read, or are not what was spilled.
    """
    try:
        found = 0
        for row in _emptied(folder, buckets):
            found += row.times
            yield row
    except OSError as error:
        raise HostError(
            f"cannot read back `{folder}`", cause=error.strerror or str(error), hint="run the same command again"
        ) from error
    if found != expected:
        raise HostError(
            f"`{folder}` changed while it was in use",
            cause=f"{expected:,} rows were put there, {found:,} came back",
            hint="run the same command again, and let no other machine clean the folder meanwhile",
        )


def _emptied(folder: Path, buckets: int) -> Iterator[SpilledRow]:
    for bucket, paths in _bucket_files(folder):
        total = sum(path.stat().st_size for path in paths)
        if total <= LARGEST_BUCKET_BYTES:
            yield from _sorted(paths)
            continue
        factor = -(-total // BUCKET_BYTES)
        finer = folder / f"split-{bucket}"
        finer.mkdir()
        spill = Spill(finer, buckets * factor)
        for path in paths:
            for entries, data in _blocks(path):
                start = 0
                for high, low, size, times, *notes in _ENTRY.iter_unpack(entries):
                    spill._add((high, low), bytes(data[start : start + size]), times, (notes[0], notes[1]))
                    start += size
            path.unlink()
        spill.flush()
        for _, parts in _bucket_files(finer):
            yield from _sorted(parts)
        finer.rmdir()


def _bucket_files(folder: Path) -> list[tuple[int, list[Path]]]:
    """Bucket numbers in order, each with the files that processes made for it."""
    found: dict[int, list[Path]] = defaultdict(list)
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            found[int(match[1])].append(path)
    return sorted(found.items())


def _blocks(path: Path) -> Iterator[tuple[bytes, memoryview]]:
    """The blocks of a file: the entries and the rows."""
    with open(path, "rb") as file:
        while header := file.read(_BLOCK.size):
            rows, size = _BLOCK.unpack(header)
            yield file.read(rows * _ENTRY.size), memoryview(file.read(size))


def _sorted(paths: list[Path]) -> Iterator[SpilledRow]:
    """The distinct rows of one bucket in order. Only one copy of a row is read."""
    import numpy as np

    entries, origin = _index(paths)
    size = entries["size"]
    starts = origin["start"]
    order = np.lexsort((starts, origin["file"], entries["low"], entries["high"]))
    places = entries[["high", "low"]][order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = places[1:] != places[:-1]
    firsts = np.flatnonzero(is_first)
    times = np.add.reduceat(entries["times"][order], firsts) if len(firsts) else firsts
    chosen = order[firsts]
    # Read in the order of the files, in runs without a gap; handed out in the order of the places.
    by_file = chosen[np.lexsort((starts[chosen], origin["file"][chosen]))]
    lengths = size[by_file].astype(np.int64)
    where = np.zeros(len(entries), dtype=np.int64)
    where[by_file] = np.cumsum(lengths) - lengths
    data = bytearray(int(lengths.sum()))
    filled = 0
    for number, path in enumerate(paths):
        rows = by_file[origin["file"][by_file] == number]
        gaps = np.flatnonzero(starts[rows][1:] != (starts[rows] + size[rows])[:-1]) + 1
        with open(path, "rb") as file, memoryview(data) as view:
            for run in np.split(rows, gaps) if len(rows) else []:
                length = int(size[run].sum())
                file.seek(int(starts[run[0]]))
                file.readinto(view[filled : filled + length])
                filled += length
        path.unlink()
    view = memoryview(data)
    columns = (where[chosen], size[chosen], times, entries["first"][chosen], entries["second"][chosen])
    for start, length, count, first, second in zip(*(column.tolist() for column in columns), strict=True):
        yield SpilledRow(view[start : start + length], count, (first, second))


def _index(paths: list[Path]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The entries of all blocks, and in which file at which byte each row is."""
    import numpy as np

    entry = np.dtype([(name, "<u8") for name in ("high", "low", "size", "times", "first", "second")])
    entries, origins = [np.empty(0, entry)], [np.empty(0, [("file", "<u4"), ("start", "<u8")])]
    for number, path in enumerate(paths):
        with open(path, "rb") as file:
            while header := file.read(_BLOCK.size):
                rows, size = _BLOCK.unpack(header)
                block = np.frombuffer(file.read(rows * _ENTRY.size), entry)
                origin = np.empty(rows, origins[0].dtype)
                origin["file"] = number
                origin["start"] = file.tell() + np.cumsum(block["size"]) - block["size"]
                entries.append(block)
                origins.append(origin)
                file.seek(size, os.SEEK_CUR)
    return np.concatenate(entries), np.concatenate(origins)
