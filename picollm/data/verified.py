"""Which files of a downloaded dataset were hashed and found right, and what was counted in them then.

A line of `verified.jsonl` holds for a file as long as its size, times and inode stay what they were; a file that was
copied, cut or written to since is hashed again before anybody reads it. The journal is no part of the dataset's
identity and may be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from picollm.errors import first_line
from picollm.files import sha256_file

if TYPE_CHECKING:
    import pyarrow.parquet

    from picollm.data.dataset_record import ShardFile

JOURNAL = "verified.jsonl"


class Wrong(Exception):
    """A file is not as recorded; says how."""


@dataclass(frozen=True)
class Counts:
    """What a parquet file holds.

    Attributes:
        chars: about: bytes of the text column before compression, as the footer has them.
    """

    rows: int
    chars: int


class Verified:
    """The journal of one dataset's folder, read when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[list[int], Counts]] | None = None

    def find(self, file: ShardFile) -> Counts | None:
        """What was counted in a file, if it was verified and has not been touched since."""
        stamp, counts = self._lines().get(file.name, (None, None))
        return counts if stamp is not None and stamp == _stamp(self._folder / file.name) else None

    def check(self, file: ShardFile, column: str, *, digest: str | None = None) -> Counts:
        """Hash a file, count its rows, and remember both.

        Args:
            digest: its sha256, where it has just been computed.

        Raises:
            Wrong: size, hash or content are not as recorded.
        """
        path = self._folder / file.name
        stamp = _stamp(path)
        if stamp is None:
            raise Wrong("it does not exist")
        if stamp[0] != file.bytes:
            raise Wrong(f"it has {stamp[0]:,} bytes, its record says {file.bytes:,}")
        if (digest or sha256_file(path)) != file.sha256:
            raise Wrong("its sha256 is not the recorded one")
        counts = _count(path, column)
        self._note(file, stamp, counts)
        return counts

    def forget(self, file: ShardFile) -> None:
        """Take a file for unverified from now on: somebody hashed it and found it wrong."""
        if self.find(file) is not None:
            self._note(file, [], Counts(0, 0))

    def _note(self, file: ShardFile, stamp: list[int], counts: Counts) -> None:
        self._lines()[file.name] = (stamp, counts)
        line = json.dumps({"name": file.name, "stamp": stamp} | asdict(counts)) + "\n"
        # A dataset on a disk that is read only is hashed by everybody who reads it.
        with contextlib.suppress(OSError):
            fd = os.open(self._folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, line.encode())  # one write of a short line is whole, whoever else appends
            finally:
                os.close(fd)

    def _lines(self) -> dict[str, tuple[list[int], Counts]]:
        if self._known is None:
            known = {}
            try:
                lines = (self._folder / JOURNAL).read_bytes().splitlines()
            except OSError:
                lines = []
            for line in lines:
                try:
                    entry = json.loads(line)
                    known[entry["name"]] = (entry["stamp"], Counts(int(entry["rows"]), int(entry["chars"])))
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a crash
            self._known = known
        return self._known


def _stamp(path: Path) -> list[int] | None:
    """What changes when a file is written to or replaced, its times kept or not; None when there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _count(path: Path, column: str) -> Counts:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            if problem := column_problem(parquet.metadata, column):
                raise Wrong(problem)
            return counts_of(parquet.metadata, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise Wrong(f"it is not readable parquet: {first_line(error)}") from error


def counts_of(footer: pyarrow.parquet.FileMetaData, column: str) -> Counts:
    """Rows, and characters by the size of the column, of which every row takes four bytes for its length."""
    stored = 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        stored += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return Counts(footer.num_rows, max(0, stored - 4 * footer.num_rows))


def column_problem(footer: pyarrow.parquet.FileMetaData, column: str) -> str | None:
    """Why a column cannot be read as text, or None."""
    import pyarrow

    schema = footer.schema.to_arrow_schema()
    if column not in schema.names:
        return f"it has no column `{column}`; its columns are: {', '.join(schema.names)}"
    kind = schema.field(column).type
    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(inner) or pyarrow.types.is_large_string(inner)):
        return f"its column `{column}` holds {kind}, not text"
    return None
