"""The user's own files -> a dataset: streaming, checked line by line, there as a whole or not at all.

Two passes in bounded memory. The first reads the files, side by side in several processes, and spills every good row
to buckets (`spill.py`); the second reads bucket after bucket, drops duplicates and writes the shards. What comes out
is a permutation of the distinct rows that depends on nothing but the rows.

Which side of the split a document falls on is decided by a hash of its text, so the same document always falls on the
same side, and adding files moves none of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter, conversation_line, name_taken
from picollm.data.datasets import TOY_NAMES, Dataset, Kind
from picollm.data.pool import in_processes
from picollm.data.readers import STDIN, UNPACKED, SourceFile, find_files, read_records, suffix_of
from picollm.data.spill import Spill, emptied, num_buckets
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.files import disk_errors, sha256_file
from picollm.hardware import disk_free
from picollm.run_dir import check_name, datasets_dir
from picollm.units import size

SPLIT_SALT = b"picollm validation split 1\0"
_HASH_RANGE = 1 << 64
# The record names so many inputs for a reader; `sha256` covers all of them.
NAMED_INPUTS = 20
# Files are handed to a process in batches of about so many bytes, or so many files.
TASK_BYTES = 64 << 20
TASK_FILES = 500

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

    Attributes:
        documents: rows of both splits: documents or conversations.
        duplicates: rows left out because the same row was there already.
        rejected: input rows left out, by reason.
        num_files, num_skipped: input files read, and those inside folders left out for their ending.
        already_there: the same import had been done before; nothing was written.
        moved_to: where the dataset went that had the name before, under `--force`.
    """

    dataset: Dataset
    documents: int
    characters: int
    validation: int
    duplicates: int
    rejected: dict[str, int]
    num_files: int
    num_skipped: int
    already_there: bool = False
    moved_to: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.dataset.name,
            "kind": self.dataset.kind,
            "path": str(self.dataset.path),
            "sha256": self.dataset.sha256,
            "documents": self.documents,
            "characters": self.characters,
            "validation": self.validation,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
            "files": self.num_files,
            "skipped_files": self.num_skipped,
            "already_there": self.already_there,
            "moved_to": str(self.moved_to) if self.moved_to else None,
        }


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


def import_paths(
    name: str,
    paths: list[Path],
    *,
    field: str = "text",
    min_chars: int = 1,
    base: Path | None = None,
    validation_share: float = 0.05,
    force: bool = False,
    processes: int | None = None,
    on_progress: Progress | None = None,
) -> ImportSummary:
    """Make the dataset `name` from files and folders of the kinds in `readers.SUFFIXES`; `-` reads standard input.

    Whether it is a dataset of text or of conversations is decided by the first row. Nothing appears under the final
    name before everything is written and on disk. Running the identical import again changes nothing.

    Args:
        field, min_chars, validation_share: see Rules.
        force: a dataset that has the name moves to `datasets/.old/`.
        processes: that read files side by side; as many as there are cores and work for.
        on_progress: called with (bytes read, bytes in all).

    Raises:
        ConfigError: something about the input or the name; file and line are named.
        HostError: no room on the disk, or it cannot be written.
    """
    check_name("dataset", name)
    if name in TOY_NAMES:
        raise ConfigError(
            f"`{name}` is the name of a built-in dataset",
            hint="choose another, such as `picollm data import my-text …`",
        )
    if not 0 < validation_share < 1:
        raise ConfigError(
            f"validation_share = {validation_share} is not between 0 and 1", hint="0.05 is the usual share"
        )
    rules = Rules(field, min_chars, validation_share)
    with DatasetWriter(name, base) as writer:
        named = [_spool_stdin(writer.scratch) if path == STDIN else path for path in paths]
        files, num_skipped = find_files(named)
        inputs = _Inputs(files, rules)
        if not force and (datasets_dir(base) / name).exists():
            return _summary(_identical(name, base, inputs), len(files), num_skipped, already_there=True)
        room = _check_room(files, datasets_dir(base))
        buckets = num_buckets(room)
        tally = _spill(writer.scratch, inputs, buckets, processes, on_progress)
        _check_enough(tally, paths)
        limit = int(validation_share * _HASH_RANGE)
        if not tally.lowest < limit <= tally.highest:
            # A few documents that all fall on one side: the one with the lowest hash is the validation split.
            limit = tally.lowest + 1
        assert tally.kind is not None
        writer.start(tally.kind)
        duplicates = 0
        for row, times in emptied(writer.scratch, buckets):
            duplicates += times - 1
            text: str | Conversation = row.decode()
            if tally.kind == "conversations":
                text = Conversation.from_json(json.loads(row))
            writer.add("validation" if split_position(text) < limit else "train", text)
        dataset, moved = writer.publish(
            inputs.describe(tally.digests),
            rejected=dict(sorted(tally.rejected.items())) | ({"duplicate": duplicates} if duplicates else {}),
            existing="move" if force else "keep",
        )
    return _summary(dataset, len(files), num_skipped, moved_to=moved)


def _spool_stdin(folder: Path) -> Path:
    """Standard input as a file: JSON lines when it starts with `{`, else plain text."""
    with disk_errors(folder):
        first = sys.stdin.buffer.read(1 << 16)
        path = folder / (
            "stdin.jsonl" if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else "stdin.txt"
        )
        with open(path, "wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


class _Inputs:
    """The files of an import and what they amount to."""

    def __init__(self, files: list[SourceFile], rules: Rules) -> None:
        self.files, self.rules = files, rules

    def describe(self, digests: dict[int, str] | None = None) -> dict[str, Any]:
        """The `source` of the record: decides whether another import is the same.

        Args:
            digests: hashes of files by index, where they are known.
        """
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            known = (digests or {}).get(number)
            digest.update(f"{file.label}\0{known or _digest(file)}\n".encode())
        return {
            "importer": "picollm data import 2",
            "inputs": sorted({file.label.split("/")[0] for file in self.files})[:NAMED_INPUTS],
            "files": len(self.files),
            "bytes": sum(file.size for file in self.files),
            "sha256": digest.hexdigest(),
            "field": self.rules.field,
            "min_chars": self.rules.min_chars,
            "validation_share": self.rules.validation_share,
        }


def _digest(file: SourceFile) -> str:
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise ConfigError(f"cannot read `{file.path}`", cause=error.strerror) from error


# -- the first pass ---------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What the files of one task, or of all, came to; tasks are added up in the order of their files."""

    kind: Kind | None = None
    first_place: str = ""
    accepted: int = 0
    lowest: int = _HASH_RANGE
    highest: int = -1
    rejected: Counter[str] = field(default_factory=Counter)
    digests: dict[int, str] = field(default_factory=dict)
    bytes: int = 0

    def see(self, kind: Kind, place: str) -> None:
        """Raises ConfigError: this row is of another kind than the first."""
        if self.kind is None:
            self.kind, self.first_place = kind, place
        elif kind != self.kind:
            raise ConfigError(
                f"`{place}` is of another kind than what came before",
                cause=f"it is {_singular(kind)}, but the first row, `{self.first_place}`, is {_singular(self.kind)}",
                hint="import text and conversations as two datasets",
            )

    def add(self, other: _Tally) -> None:
        if other.kind is not None:
            self.see(other.kind, other.first_place)
        self.accepted += other.accepted
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        self.rejected += other.rejected
        self.digests |= other.digests


# (number of the task, its files with their numbers)
_Task = tuple[int, list[tuple[int, SourceFile]]]


def _tasks(files: list[SourceFile]) -> list[_Task]:
    tasks: list[_Task] = []
    for numbered in enumerate(files):
        last = tasks[-1][1] if tasks else []
        if not last or len(last) >= TASK_FILES or sum(file.size for _, file in last) >= TASK_BYTES:
            tasks.append((len(tasks), [numbered]))
        else:
            last.append(numbered)
    return tasks


def _spill(folder: Path, inputs: _Inputs, buckets: int, processes: int | None, on_progress: Progress | None) -> _Tally:
    """Read every file and spill its rows."""
    tasks = _tasks(inputs.files)
    total = sum(file.size for file in inputs.files)
    done = 0
    found: dict[int, _Tally] = {}

    def tell(inside: int = 0) -> None:
        if on_progress:
            on_progress(done + inside, total)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(len(tasks), processes or cores)
    if processes == 1:
        for number, part in tasks:
            found[number] = _read(folder, inputs.rules, buckets, (number, part), tell)
            done += sum(file.size for _, file in part)
    else:
        setup = (folder, inputs.rules, buckets)
        for number, tally in in_processes(_work, tasks, processes, setup=_open, arguments=setup, tick=tell):
            found[number] = tally
            done += sum(file.size for _, file in tasks[number][1])
    tell()
    whole = _Tally()
    for number in sorted(found):
        whole.add(found[number])
    return whole


_setup: tuple[Path, Rules, int]


def _open(folder: Path, rules: Rules, buckets: int) -> None:
    global _setup
    _setup = (folder, rules, buckets)


def _work(task: _Task) -> tuple[int, _Tally]:
    return task[0], _read(*_setup, task, lambda inside: None)


def _read(folder: Path, rules: Rules, buckets: int, task: _Task, tell: Callable[[int], None]) -> _Tally:
    """Spill the rows of a task's files, one file after the other."""
    number, files = task
    tally, spill, before = _Tally(), Spill(folder, number, buckets), 0
    for index, file in files:
        tally.digests[index] = _digest(file)
        for record in read_records(file, rules.field):
            tell(before + record.done)
            tally.see(record.kind, record.place)
            row, rejected = record.row, record.rejected
            if row is not None and (len(row) if isinstance(row, str) else row.num_chars) < rules.min_chars:
                row, rejected = None, f"shorter than {rules.min_chars} characters"
            if row is None:
                tally.rejected[rejected or ""] += 1
                continue
            position = split_position(row)
            tally.accepted += 1
            tally.lowest, tally.highest = min(tally.lowest, position), max(tally.highest, position)
            spill.add((row if isinstance(row, str) else conversation_line(row)).encode())
        before += file.size
        tell(before)
    spill.flush()
    return tally


def split_position(row: str | Conversation) -> int:
    """A row's place in 0 … 2**64 - 1, from a salted hash of its text alone: low ones are validation."""
    text = row if isinstance(row, str) else conversation_line(row)
    return int.from_bytes(hashlib.sha256(SPLIT_SALT + text.encode()).digest()[:8], "big")


def _singular(kind: Kind) -> str:
    return "a document" if kind == "text" else "a conversation"


def _check_enough(tally: _Tally, paths: list[Path]) -> None:
    named = ", ".join(f"`{path}`" for path in paths[:3]) + (", …" if len(paths) > 3 else "")
    if tally.accepted == 0:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.rejected.items())
        raise ConfigError(
            f"no document in {named}",
            cause=f"every row was rejected: {reasons}" if reasons else "there is no row in it",
            hint="a dataset needs at least two documents",
        )
    if tally.lowest == tally.highest:
        raise ConfigError(
            f"only one document in {named}",
            cause="the same text again does not count" if tally.accepted > 1 else "one is needed for validation",
            hint="a dataset needs at least two documents; add files, or a text of more than 16 000 characters",
        )


def _check_room(files: list[SourceFile], folder: Path) -> int:
    """Compare the size of the input with the free room before anything is written; returns the bytes of its rows."""
    rows = sum(file.size * UNPACKED.get(suffix_of(file.path) or "", 1) for file in files)
    needed = rows + rows // 2  # the spilled rows, and beside them the shards, which are packed
    if (free := disk_free(folder)) < needed:
        raise HostError(
            f"not enough room for the dataset under `{folder}`",
            cause=f"it needs about {size(needed)} while it is made, {size(free)} are free",
            hint="free some, or set PICOLLM_BASE_DIR to a larger disk",
        )
    return rows


def _identical(name: str, base: Path | None, inputs: _Inputs) -> Dataset:
    """The dataset that has the name, when this very import made it and it is intact.

    Raises:
        ConfigError: it is another one.
    """
    try:
        dataset = Dataset.open(name, base)
        dataset.check_sizes()
    except (IntegrityError, MissingArtifact) as error:
        raise ConfigError(
            f"there is a folder for dataset `{name}` already, and it is damaged",
            cause=error.cause,
            hint="add `--force`, which moves it to `datasets/.old/` and imports again",
        ) from error
    if dataset.source != inputs.describe():  # hashes the files
        raise name_taken(name)
    return dataset


def _summary(dataset: Dataset, num_files: int, num_skipped: int, **outcome: Any) -> ImportSummary:
    return ImportSummary(
        dataset=dataset,
        documents=dataset.rows(),
        characters=dataset.chars(),
        validation=dataset.rows("validation"),
        duplicates=dataset.totals["rejected"].get("duplicate", 0),
        rejected={reason: n for reason, n in dataset.totals["rejected"].items() if reason != "duplicate"},
        num_files=num_files,
        num_skipped=num_skipped,
        **outcome,
    )
