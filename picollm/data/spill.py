"""Rows of any number -> each distinct row once, in a permutation of all of them, in bounded memory.

A row's place is a salted hash of its text. Rows are spilled to buckets by the first bits of it; each bucket is then
read, sorted by the whole hash and emptied. Equal rows meet in one bucket side by side, so duplicates fall out, and the
order is a global permutation that does not depend on how the input was ordered or split over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from picollm.files import disk_errors

SALT = b"picollm import order 1\0"
PLACE_BYTES = 16
# Bytes of rows that one bucket should hold: what the second pass keeps in memory at a time.
BUCKET_BYTES = 48 << 20
MAX_BUCKETS = 4096
# Bytes of rows held back before they are appended to their buckets, over all of them.
BUFFER_BYTES = 32 << 20
_HEADER_BYTES = PLACE_BYTES + 8


def num_buckets(input_bytes: int) -> int:
    """Buckets for an input of so many bytes."""
    return min(MAX_BUCKETS, max(1, -(-input_bytes // BUCKET_BYTES)))


def place_of(row: bytes) -> bytes:
    """Where a row stands in the permutation: 16 bytes, equal for equal rows only."""
    return hashlib.blake2b(SALT + row, digest_size=PLACE_BYTES).digest()


class Spill:
    """One process's half of the work: rows into bucket files of its own.

    Args:
        folder: shared by all processes.
        writer: number of this process; part of the file names.
        buckets: the same for all processes.
    """

    def __init__(self, folder: Path, writer: int, buckets: int) -> None:
        self._folder, self._writer, self._buckets = folder, writer, buckets
        self._held: list[list[bytes]] = [[] for _ in range(buckets)]
        self._held_bytes = 0

    def add(self, row: bytes) -> None:
        """Keep a row."""
        place = place_of(row)
        held = self._held[int.from_bytes(place[:4]) * self._buckets >> 32]
        held += (place, len(row).to_bytes(8), row)
        self._held_bytes += len(row) + _HEADER_BYTES
        if self._held_bytes >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is held to the bucket files.

        Raises:
            HostError: the disk is full.
        """
        for bucket, held in enumerate(self._held):
            if held:
                path = self._folder / f"{bucket:04d}-{self._writer}.rows"
                with disk_errors(path), open(path, "ab") as file:
                    file.writelines(held)
                held.clear()
        self._held_bytes = 0


def emptied(folder: Path, buckets: int) -> Iterator[tuple[bytes, int]]:
    """Every distinct row in order of its place, and how often it came; bucket files are removed as they are read."""
    for bucket in range(buckets):
        files = sorted(folder.glob(f"{bucket:04d}-*.rows"))
        found: dict[bytes, tuple[bytes, int]] = {}
        for path in files:
            with open(path, "rb") as file:
                while header := file.read(_HEADER_BYTES):
                    place, size = header[:PLACE_BYTES], int.from_bytes(header[PLACE_BYTES:])
                    row, times = found.get(place, (None, 0))
                    if row is None:
                        row = file.read(size)
                    else:
                        file.seek(size, 1)
                    found[place] = (row, times + 1)
            path.unlink()
        for place in sorted(found):
            yield found[place]
