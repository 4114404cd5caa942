"""The first pass of an import: files are read side by side in several processes, and their good rows spilled."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picollm.data.conversations import Conversation
from picollm.data.dataset_record import Kind
from picollm.data.dataset_writer import conversation_line
from picollm.data.pool import in_processes
from picollm.data.readers import Record, place, read_records
from picollm.data.sources import Piece, SourceFile, tasks_of
from picollm.data.spill import Spill
from picollm.errors import ConfigError
from picollm.files import sha256_file
from picollm.hardware import usable_cpus

SPLIT_SALT = b"picollm validation split 1\0"
HASH_RANGE = 1 << 64
# More would wait for the one process that writes, and each holds about 100 MiB.
MAX_PROCESSES = 16
# Bytes that a process reads before it says so.
TELL_BYTES = 1 << 20


@dataclass(frozen=True)
class Rules:
    """What an import takes from its files.

    Attributes:
        field: the column or key with the text.
        min_chars: shorter documents and conversations are left out.
        validation_share: share of the documents that goes to validation; at least one does.
    """

    field: str = "text"
    min_chars: int = 1
    validation_share: float = 0.05


@dataclass
class Tally:
    """What the rows of some pieces came to.

    Attributes:
        first: the first row that had a kind: its piece and number.
        accepted: rows spilled, duplicates included.
        lowest, highest: of the rows' places in the split.
        digests: sha256 of files by number.
    """

    kind: Kind | None = None
    first: tuple[Piece, int] | None = None
    accepted: int = 0
    lowest: int = HASH_RANGE
    highest: int = -1
    rejected: Counter[str] = field(default_factory=Counter)
    digests: dict[int, str] = field(default_factory=dict)

    def see(self, kind: Kind, piece: Piece, number: int) -> None:
        """Raises ConfigError: this row is of another kind than the first."""
        if self.kind is None:
            self.kind, self.first = kind, (piece, number)
        elif kind != self.kind:
            assert self.first is not None
            raise ConfigError(
                f"`{place(piece, number)}` is of another kind than what came before",
                cause=f"it is {_singular(kind)}, but the first row, `{place(*self.first)}`, is {_singular(self.kind)}",
                hint="import text and conversations as two datasets",
            )

    def add(self, other: Tally) -> None:
        """Take in the rows of later pieces."""
        if other.kind is not None and other.first is not None:
            self.see(other.kind, *other.first)
        self.accepted += other.accepted
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        self.rejected += other.rejected
        self.digests |= other.digests


def read_all(
    folder: Path,
    files: list[SourceFile],
    rules: Rules,
    buckets: int,
    processes: int | None,
    on_progress: Callable[[int], None],
) -> Tally:
    """Read every file and spill its rows.

    Args:
        folder: for the spilled rows.
        processes: that read side by side; None decides by cores and work.
        on_progress: called several times a second with the bytes of files that were read; what it raises ends all.

    Raises:
        ConfigError: something in a file; file and line are named.
        HostError: the disk is full, or a process was killed.
    """
    tasks = list(enumerate(tasks_of(files)))
    found: dict[int, Tally] = {}
    processes = min(len(tasks), processes or min(usable_cpus(), MAX_PROCESSES))
    if processes <= 1:
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            on_progress(done)

        spill = Spill(folder, buckets)
        for number, pieces in tasks:
            found[number] = _read(spill, rules, pieces, tell)
    else:
        counter = multiprocessing.get_context("spawn").Value("Q")
        setup = (folder, rules, buckets, counter)
        results = in_processes(
            _work, tasks, processes, setup=_open, arguments=setup, tick=lambda: on_progress(counter.value)
        )
        with contextlib.closing(results):
            found.update(results)
        on_progress(counter.value)
    whole = Tally()
    for number in sorted(found):
        whole.add(found[number])
    return whole


_setup: tuple[Spill, Rules, Any]


def _open(folder: Path, rules: Rules, buckets: int, counter: Any) -> None:
    """In a process of the pool, once."""
    global _setup
    _setup = (Spill(folder, buckets), rules, counter)


def _work(task: tuple[int, list[Piece]]) -> tuple[int, Tally]:
    spill, rules, counter = _setup

    def tell(more: int) -> None:
        with counter.get_lock():
            counter.value += more

    return task[0], _read(spill, rules, task[1], tell)


def _read(spill: Spill, rules: Rules, pieces: list[Piece], tell: Callable[[int], None]) -> Tally:
    """Spill the rows of a task's pieces, one after the other.

    Args:
        tell: called with the bytes read since the last call.
    """
    tally = Tally()
    untold = 0
    for piece in pieces:
        if not piece.start:
            tally.digests[piece.number] = digest_of(piece.file)
        told = 0
        for record in read_records(piece, rules.field):
            if record.done - told >= TELL_BYTES:
                tell(untold + min(record.done, piece.bytes) - told)
                told, untold = min(record.done, piece.bytes), 0
            tally.see(record.kind, piece, record.number)
            _take(record, rules, tally, spill)
        piece.file.check_unchanged()
        untold += piece.bytes - told
        if untold >= TELL_BYTES:
            tell(untold)
            untold = 0
    spill.flush()
    tell(untold)
    return tally


def _take(record: Record, rules: Rules, tally: Tally, spill: Spill) -> None:
    row, rejected, chars = record.row, record.rejected, 0
    if row is not None:
        chars = len(row) if isinstance(row, str) else row.num_chars
        if chars < rules.min_chars:
            rejected = f"shorter than {rules.min_chars:,} characters"
    if row is None or rejected:
        tally.rejected[rejected or ""] += 1
        return
    data = (row if isinstance(row, str) else conversation_line(row)).encode()
    position = position_of(data)
    tally.accepted += 1
    tally.lowest, tally.highest = min(tally.lowest, position), max(tally.highest, position)
    spill.add(data, (position, chars))


def split_position(row: str | Conversation) -> int:
    """A row's place in 0 … 2**64 - 1, from a salted hash of its text alone: low ones are validation."""
    return position_of((row if isinstance(row, str) else conversation_line(row)).encode())


def position_of(data: bytes) -> int:
    """As `split_position`, of a row's bytes."""
    digest = hashlib.sha256(SPLIT_SALT)
    digest.update(data)
    return int.from_bytes(digest.digest()[:8], "big")


def digest_of(file: SourceFile) -> str:
    """sha256 of a file to import.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise ConfigError(f"cannot read `{file.shown}`", cause=error.strerror) from error


def _singular(kind: Kind) -> str:
    return "a document" if kind == "text" else "a conversation"
