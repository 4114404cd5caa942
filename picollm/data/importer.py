"""The user's own files -> a dataset: streaming, checked line by line, there as a whole or not at all.

Which side of the split a document falls on is decided by a hash of its text, so the same document always falls on the
same side, and adding files moves none of the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter, conversation_line, name_taken
from picollm.data.datasets import TOY_NAMES, Dataset, Kind
from picollm.data.readers import Record, SourceFile, find_files, read_records
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.files import sha256_file
from picollm.hardware import disk_free
from picollm.run_dir import check_name, datasets_dir
from picollm.units import size

SPLIT_SALT = b"picollm validation split 1\0"
_HASH_RANGE = 1 << 64
# Text in JSON lines packs about this well; used to guess the room a `.gz` needs.
_GZIP_RATIO = 6
# The record names so many inputs for a reader; `sha256` covers all of them.
NAMED_INPUTS = 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

    Attributes:
        documents: rows of both splits: documents or conversations.
        rejected: input rows left out, by reason.
        num_files, num_skipped: input files read, and those inside folders left out for their ending.
        already_there: the same import had been done before; nothing was written.
        moved_to: where the dataset went that had the name before, under `--force`.
    """

    dataset: Dataset
    documents: int
    characters: int
    validation: int
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
    base: Path | None = None,
    validation_share: float = 0.05,
    force: bool = False,
    on_progress: Progress | None = None,
) -> ImportSummary:
    """Make the dataset `name` from files and folders: `.txt .md .rst .jsonl .jsonl.gz .parquet`.

    Whether it is a dataset of text or of conversations is decided by the first row. Nothing appears under the final
    name before everything is written and on disk. Running the identical import again changes nothing.

    Args:
        field: the column or key with the text.
        validation_share: share of the documents that goes to validation; at least one does.
        force: a dataset that has the name moves to `datasets/.old/`.
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
    files, num_skipped = find_files(paths)
    inputs = _Inputs(files, field, validation_share)
    if not force and (datasets_dir(base) / name).exists():
        return _summary(_identical(name, base, inputs), len(files), num_skipped, already_there=True)
    _check_room(files, datasets_dir(base))
    with DatasetWriter(name, base) as writer:
        tally = _write(writer, inputs, int(validation_share * _HASH_RANGE), on_progress)
        _check_enough(tally, paths)
        if not (writer.rows("train") and writer.rows("validation")):
            # A few documents that happened to fall on one side: the one with the lowest hash is the validation split.
            tally = _write(writer, inputs, tally.lowest + 1, on_progress)
        dataset, moved = writer.publish(
            inputs.describe(), rejected=dict(sorted(tally.rejected.items())), existing="move" if force else "keep"
        )
    return _summary(dataset, len(files), num_skipped, moved_to=moved)


class _Inputs:
    """The files of an import and what they amount to; each is hashed once, just before it is read."""

    def __init__(self, files: list[SourceFile], field: str, validation_share: float) -> None:
        self.files, self.field, self.validation_share = files, field, validation_share
        self._digests: dict[SourceFile, str] = {}

    def records(self, on_progress: Progress | None) -> Iterator[Record]:
        done, total = 0, sum(file.size for file in self.files)
        for file in self.files:
            self._digest(file)
            for record in read_records(file, self.field):
                if on_progress:
                    on_progress(done + record.done, total)
                yield record
            done += file.size
            if on_progress:
                on_progress(done, total)

    def _digest(self, file: SourceFile) -> str:
        if file not in self._digests:
            try:
                self._digests[file] = sha256_file(file.path)
            except OSError as error:
                raise ConfigError(f"cannot read `{file.path}`", cause=error.strerror) from error
        return self._digests[file]

    def describe(self) -> dict[str, Any]:
        """The `source` of the record: decides whether another import is the same."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.label}\0{self._digest(file)}\n".encode())
        return {
            "importer": "picollm data import",
            "inputs": sorted({file.label.split("/")[0] for file in self.files})[:NAMED_INPUTS],
            "files": len(self.files),
            "bytes": sum(file.size for file in self.files),
            "sha256": digest.hexdigest(),
            "field": self.field,
            "validation_share": self.validation_share,
        }


@dataclass
class _Tally:
    accepted: int = 0
    lowest: int = _HASH_RANGE
    highest: int = -1
    rejected: Counter[str] = field(default_factory=Counter)


def _write(writer: DatasetWriter, inputs: _Inputs, limit: int, on_progress: Progress | None) -> _Tally:
    """Write every row; those whose hash is below `limit` are the validation split."""
    tally = _Tally()
    kind: Kind | None = None
    first_place = ""
    for record in inputs.records(on_progress):
        if kind is None:
            kind, first_place = record.kind, record.place
            writer.start(kind)
        elif record.kind != kind:
            raise ConfigError(
                f"`{record.place}` is of another kind than what came before",
                cause=f"it is {_singular(record.kind)}, but the first row, `{first_place}`, is {_singular(kind)}",
                hint="import text and conversations as two datasets",
            )
        if record.row is None:
            tally.rejected[record.rejected or ""] += 1
            continue
        position = split_position(record.row)
        tally.accepted += 1
        tally.lowest, tally.highest = min(tally.lowest, position), max(tally.highest, position)
        writer.add("validation" if position < limit else "train", record.row)
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


def _check_room(files: list[SourceFile], folder: Path) -> None:
    """Compare the size of the input with the free room before anything is written."""
    needed = sum(file.size * (_GZIP_RATIO if file.path.name.lower().endswith(".gz") else 1) for file in files)
    if (free := disk_free(folder)) < needed:
        raise HostError(
            f"not enough room for the dataset under `{folder}`",
            cause=f"it needs about {size(needed)}, {size(free)} are free",
            hint="free some, or set PICOLLM_BASE_DIR to a larger disk",
        )


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
    if dataset.source != inputs.describe():
        raise name_taken(name)
    return dataset


def _summary(dataset: Dataset, num_files: int, num_skipped: int, **outcome: Any) -> ImportSummary:
    return ImportSummary(
        dataset=dataset,
        documents=dataset.rows(),
        characters=dataset.chars(),
        validation=dataset.rows("validation"),
        rejected=dict(dataset.totals["rejected"]),
        num_files=num_files,
        num_skipped=num_skipped,
        **outcome,
    )
