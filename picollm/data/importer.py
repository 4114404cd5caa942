"""The user's own files -> a dataset: streaming, checked line by line, there as a whole or not at all.

Two passes in bounded memory. The first reads the files, side by side in several processes, and spills every good row
to buckets (`spill.py`); the second reads bucket after bucket, drops duplicates and writes the shards. What comes out
is a permutation of the distinct rows that depends on nothing but the rows.

Which side of the split a document falls on is decided by a hash of its text, so the same document always falls on the
same side, and adding files moves none of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.data.dataset_record import Split
from picollm.data.dataset_writer import DatasetWriter, name_taken
from picollm.data.datasets import Dataset
from picollm.data.intake import HASH_RANGE, Rules, Tally, digest_of, read_all
from picollm.data.registry import TOY_NAMES
from picollm.data.sources import SourceFile, find_files, text_bytes
from picollm.data.spill import SpilledRow, emptied, num_buckets
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.hardware import disk_free
from picollm.run_dir import check_name, datasets_dir
from picollm.units import size

# The record names so many inputs for a reader; `sha256` covers all of them.
NAMED_INPUTS = 20

# (bytes of the input that are dealt with, bytes in all); what it raises ends the import
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
    """Make the dataset `name` from files and folders of the kinds in `sources.SUFFIXES`; `-` reads standard input.

    Whether it is a dataset of text or of conversations is decided by the first row. Nothing appears under the final
    name before everything is written and on disk. Running the identical import again changes nothing.

    Args:
        field, min_chars, validation_share: see Rules.
        force: a dataset that has the name moves to `datasets/.old/`.
        processes: that read files side by side; as many as there are cores and work for.
        on_progress: called with (bytes read, bytes in all).

    Raises:
        ConfigError: something about the input or the name; file and line are named.
        HostError: no room on the disk, or it cannot be written; or memory ran out.
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
    if min_chars < 0:
        raise ConfigError(f"min_chars = {min_chars} is negative", hint="1 keeps every document that is not empty")
    rules = Rules(field, min_chars, validation_share)
    with _memory_errors(), DatasetWriter(name, base) as writer:
        files, num_skipped = find_files(paths, writer.scratch)
        inputs = _Inputs(files, rules)
        if not force and (datasets_dir(base) / name).exists():
            return _summary(_identical(name, base, inputs), len(files), num_skipped, already_there=True)
        buckets = num_buckets(_check_room(files, datasets_dir(base)))
        progress = _Progress(files, on_progress)
        tally = read_all(writer.scratch, files, rules, buckets, processes, progress.read)
        _check_enough(tally, paths)
        rows = emptied(writer.scratch, buckets, tally.accepted)
        duplicates = _write(writer, rows, tally, int(validation_share * HASH_RANGE), progress)
        dataset, moved = writer.publish(
            inputs.describe(tally.digests),
            rejected=dict(sorted(tally.rejected.items())) | ({"duplicate": duplicates} if duplicates else {}),
            existing="move" if force else "keep",
        )
    return _summary(dataset, len(files), num_skipped, moved_to=moved)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise HostError(
            "memory ran out", hint="free some, or split very long documents: one is in memory several times over"
        ) from error


def _write(writer: DatasetWriter, rows: Iterator[SpilledRow], tally: Tally, limit: int, progress: _Progress) -> int:
    """The second pass: rows in their final order into the shards of their split.

    Args:
        limit: rows with a lower place in the split are validation.

    Returns:
        How many rows were left out because they were there already.
    """
    if not tally.lowest < limit <= tally.highest:
        # A few documents that all fall on one side: the one with the lowest hash is the validation split.
        limit = tally.lowest + 1
    assert tally.kind is not None
    writer.start(tally.kind)
    written = duplicates = 0
    for data, times, (position, chars) in rows:
        split: Split = "validation" if position < limit else "train"
        writer.add_line(split, str(data, "utf-8"), chars, len(data))
        duplicates += times - 1
        written += times
        progress.write(written / tally.accepted)
    return duplicates


class _Progress:
    """Reading is taken for one half of the work, writing for the other."""

    def __init__(self, files: list[SourceFile], on_progress: Progress | None) -> None:
        self._total = sum(file.size for file in files)
        self._last, self._on_progress = -1, on_progress

    def _tell(self, done: int) -> None:
        if self._on_progress and done > self._last:
            self._last = done
            self._on_progress(done, self._total)

    def read(self, done: int) -> None:
        self._tell(done // 2)

    def write(self, share: float) -> None:
        self._tell(round(self._total * (1 + share) / 2))


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
        known = digests or {}
        for line in sorted(
            f"{file.label}\0{known.get(number) or digest_of(file)}\n" for number, file in enumerate(self.files)
        ):
            digest.update(line.encode())
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


def _check_enough(tally: Tally, paths: list[Path]) -> None:
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
    rows = text_bytes(files)
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
