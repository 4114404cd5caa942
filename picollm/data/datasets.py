"""Datasets by name: a folder of shards whose `dataset.json` pins every file, its split, size and hash.

Text lives in parquet shards with a column `text`; conversations live in JSON-lines shards. `dataset.json`
(`dataset_record.py`) carries no time and no path of a machine, so the same input gives the same bytes, and their hash
names the dataset. The record of a downloaded dataset (`download.py`) is there before its shards are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from picollm.data.conversations import Conversation
from picollm.data.dataset_record import (
    OLDER_FOLDER,
    RECORD_NAME,
    SPLITS,
    DatasetRecord,
    Kind,
    ShardFile,
    Split,
    read_record,
)
from picollm.data.documents import Documents
from picollm.data.registry import REGISTRY, TOY_NAMES
from picollm.data.verified import Counts, Verified, Wrong
from picollm.errors import ConfigError, IntegrityError, MissingArtifact, PicollmError, nearest
from picollm.files import sha256_file
from picollm.run_dir import NAME_PATTERN, check_name, datasets_dir

# Parquet with zstd holds about so many characters a byte: for shards that are not there yet.
CHARS_PER_STORED_BYTE = 2.5


@dataclass(frozen=True)
class Dataset(DatasetRecord):
    """A dataset that is there, by its record; the shards are looked at when they are read."""

    name: str
    path: Path

    @classmethod
    def open(cls, name: str, base: Path | None = None, *, keep: Collection[str] = ()) -> Dataset:
        """Read the record of `BASE/datasets/NAME`.

        Args:
            keep: hashes of records that a run was prepared with: one of them is preferred to a newer record.

        Raises:
            ConfigError: the name cannot be one.
            MissingArtifact: there is no such dataset; the hint carries the command that makes it.
            IntegrityError: the record is missing inside the folder, torn, or of another version.
        """
        folder = datasets_dir(base) / check_name("dataset", name)
        if not folder.is_dir():
            raise _missing(name, base)
        record = read_record(name, folder / RECORD_NAME)
        if record.sha256 not in keep:
            for older in sorted((folder / OLDER_FOLDER).glob("*.json")):
                if sha256_file(older) in keep:
                    record = read_record(name, older)
                    break
        return cls(**vars(record), name=name, path=folder)

    # -- a downloaded one -------------------------------------------------------------------------------------------

    @property
    def is_downloaded(self) -> bool:
        """Whether its files come from the Hub, and may not be here yet."""
        return "hub" in self.source

    @property
    def is_shuffled(self) -> bool:
        """Whether neighbours are known to have nothing in common: imports shuffle, and the registry's come shuffled."""
        return not self.is_downloaded or self.source["hub"] in {known.source.repo for known in REGISTRY.values()}

    @property
    def column(self) -> str:
        """The column of its parquet files that holds the text."""
        return self.source.get("column", "text") if self.is_downloaded else "text"

    @property
    def again(self) -> str:
        """What to do about a damaged file, as a hint."""
        if self.is_downloaded:
            return f"fetch it again with `picollm data download {self.name}`"
        if "generator" in self.source:
            return f"make it again with `picollm data show {self.name}`"
        return f"make it again with `picollm data import {self.name} PATH… --force`"

    @cached_property
    def verified(self) -> Verified:
        """Which of its files were found right, by this process or an earlier one."""
        return Verified(self.path)

    @property
    def identities(self) -> set[str]:
        """Its hash, and those of its older records."""
        return {self.sha256, *map(sha256_file, (self.path / OLDER_FOLDER).glob("*.json"))}

    def of(self, split: Split | None = None) -> list[ShardFile]:
        """The files of a split, in order; None gives all."""
        return [file for file in self.files if split in (None, file.split)]

    def missing(self, split: Split | None = None) -> list[ShardFile]:
        """Files that are not here."""
        return [file for file in self.of(split) if not (self.path / file.name).is_file()]

    def unverified(self) -> list[ShardFile]:
        """Files of a downloaded dataset that are missing, or were written to since they were found right."""
        return [file for file in self.files if self.verified.find(file) is None]

    def counted(self, file: ShardFile) -> Counts:
        """Rows and characters of a file that is here. One that was not hashed since it was last touched is hashed.

        Raises:
            MissingArtifact: it is not here yet.
            IntegrityError: it is not as recorded.
        """
        if file.rows is not None and file.chars is not None:
            return Counts(file.rows, file.chars)
        if (known := self.verified.find(file)) is not None:
            return known
        self._check_size(file)
        try:
            return self.verified.check(file, self.column)
        except Wrong as error:
            raise self.damaged(file, str(error)) from error

    def _count_all(self, split: Split | None) -> list[Counts]:
        files = self.of(split)
        if all(file.rows is not None for file in files):
            return [self.counted(file) for file in files]
        with ThreadPoolExecutor() as threads:  # hashing lets other threads run
            return list(threads.map(self.counted, files))

    # -- sizes --------------------------------------------------------------------------------------------------------

    def rows(self, split: Split | None = None) -> int:
        """Documents or conversations of a split; None counts both.

        Raises:
            MissingArtifact, IntegrityError: as `counted`.
        """
        return sum(counts.rows for counts in self._count_all(split))

    def known_rows(self, split: Split | None = None) -> int | None:
        """As `rows`, from records alone; None while files are missing or not verified."""
        known = [file.rows if file.rows is not None else self.verified.find(file) for file in self.of(split)]
        if any(found is None for found in known):
            return None
        return sum(found if isinstance(found, int) else found.rows for found in known if found is not None)

    def chars(self, split: Split | None = None) -> int:
        """Characters of text of a split; None counts both. Of a downloaded dataset it is an estimate."""
        total = 0
        for file in self.of(split):
            known = file.chars if file.chars is not None else self.verified.find(file)
            if known is None:
                known = int(file.bytes * CHARS_PER_STORED_BYTE)
            total += known.chars if isinstance(known, Counts) else known
        return total

    def bytes(self, split: Split | None = None) -> int:
        """Size on disk of a split's files, once they are here; None counts both."""
        return sum(file.bytes for file in self.of(split))

    def check_sizes(self, split: Split | None = None) -> None:
        """The cheap look before reading: every file is there with its recorded size.

        Raises:
            IntegrityError: one is not; it is named.
            MissingArtifact: files of a downloaded dataset have not come yet.
        """
        for file in self.of(split):
            self._check_size(file)

    def _check_size(self, file: ShardFile) -> None:
        path = self.path / file.name
        found = path.stat().st_size if path.is_file() else None
        if found is None and self.is_downloaded:
            absent = self.missing()
            raise MissingArtifact(
                f"dataset `{self.name}` is not complete",
                cause=f"{len(absent)} of {len(self.files)} files are missing, the first is `{absent[0].name}`",
                hint=f"finish it with `picollm data download {self.name}`",
            )
        if found != file.bytes:
            cause = "it does not exist" if found is None else f"it has {found:,} bytes, its record says {file.bytes:,}"
            raise self.damaged(file, cause)

    def damaged(self, file: ShardFile, cause: str) -> IntegrityError:
        """The error for a shard that is not as recorded."""
        then = self.again if self.is_downloaded else "make the dataset again"
        return IntegrityError(
            f"`{self.path / file.name}` of dataset `{self.name}` is damaged",
            cause=cause,
            hint=f"see what else is with `picollm data verify {self.name}`, then {then}",
        )

    def _require(self, kind: Kind, hint: str) -> None:
        if self.kind != kind:
            raise ConfigError(
                f"dataset `{self.name}` cannot be used here", cause=f"it holds {self.kind}, not {kind}", hint=hint
            )

    def documents(self, split: Split) -> Documents:
        """The texts of a split, in order.

        Raises:
            ConfigError: the dataset holds conversations.
            IntegrityError: a file is missing or has another size, or is another than was downloaded.
            MissingArtifact: a file has not been downloaded yet.
        """
        self._require("text", "pretrain on text; `[[sft.mix]]` is where a dataset of conversations goes")
        self.check_sizes(split)
        return self._documents(self.of(split), self._count_all(split))

    def _documents(self, files: list[ShardFile], counts: list[Counts]) -> Documents:
        whole = [replace(file, rows=found.rows) for file, found in zip(files, counts, strict=True)]
        return Documents(self.path, whole, self.damaged, column=self.column)

    def stream(self, split: Split, wait_for: Callable[[ShardFile], None] | None = None) -> Iterator[str]:
        """The same texts, where reading may begin before the last file is here.

        Args:
            wait_for: called before a file is opened; returns when it is here.

        Raises:
            ConfigError, IntegrityError, MissingArtifact: as `documents`, when the file's turn comes.
        """
        if not self.is_downloaded:
            yield from self.documents(split)
            return
        for file in self.of(split):
            if wait_for:
                wait_for(file)
            self._check_size(file)
            yield from self._documents([file], [self.counted(file)])

    def conversations(self, split: Split) -> list[Conversation]:
        """All conversations of a split, in order. Every shard is hashed before it is parsed.

        Raises:
            ConfigError: the dataset holds text.
            IntegrityError: a file is missing or not as recorded.
        """
        self._require("conversations", f"train on its text with `--set data.dataset={self.name}`")
        self.check_sizes(split)
        found: list[Conversation] = []
        for file in self.files:
            if file.split != split:
                continue
            data = (self.path / file.name).read_bytes()
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise self.damaged(file, "its sha256 is not the recorded one")
            found.extend(Conversation.from_json(json.loads(line)) for line in data.splitlines())
        return found

    def first_rows(self, split: Split, count: int) -> list[Any]:
        """The first rows as a user may look at them: strings, or `{"messages": …}`."""
        if self.kind == "text":
            return list(islice(self.documents(split), count))
        return [conversation.to_json() for conversation in self.conversations(split)[:count]]

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Hash every file again.

        Args:
            on_progress: called with (bytes hashed, bytes in all) after each file.

        Returns:
            One line per file that is not as recorded; empty when all are.
        """
        problems, done, total = [], 0, self.bytes()
        for file in self.files:
            path = self.path / file.name
            if not path.is_file():
                problems.append(f"{file.name}: missing")
            elif (size := path.stat().st_size) != file.bytes:
                problems.append(f"{file.name}: {size:,} bytes, recorded {file.bytes:,}")
            elif sha256_file(path) != file.sha256:
                problems.append(f"{file.name}: content changed (sha256 differs)")
                self.verified.forget(file)
            done += file.bytes
            if on_progress:
                on_progress(done, total)
        return problems

    def to_json(self) -> dict[str, Any]:
        """What the desk prints: facts and files, without rows."""
        splits = {
            split: {"rows": self.known_rows(split), "chars": self.chars(split), "bytes": self.bytes(split)}
            for split in SPLITS
        }
        return {
            "name": self.name,
            "kind": self.kind,
            "path": str(self.path),
            "sha256": self.sha256,
            "source": self.source,
            "created_by": self.created_by,
            "splits": splits,
            "missing": [file.name for file in self.missing()],
            "files": [file.to_json() for file in self.files],
        }


def _missing(name: str, base: Path | None) -> MissingArtifact:
    if name in TOY_NAMES:
        hint = f"make it with `picollm data show {name}`"
    elif name in REGISTRY:
        hint = f"get it with `picollm data download {name} --shards N`"
    else:
        known = [dataset.name for dataset in list_datasets(base)]
        close = nearest(name, sorted({*known, *TOY_NAMES, *REGISTRY}))
        make = f"make it with `picollm data import {name} PATH…`"
        hint = f"did you mean `{close}`? Otherwise {make}" if close else make
    return MissingArtifact(
        f"there is no dataset `{name}`", cause=f"`{datasets_dir(base) / name}` does not exist", hint=hint
    )


def list_datasets(
    base: Path | None = None, on_problem: Callable[[str, PicollmError], None] | None = None
) -> list[Dataset]:
    """Every dataset, by name. One whose record cannot be read is left out and told to `on_problem`."""
    found = []
    folder = datasets_dir(base)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.is_dir() or not NAME_PATTERN.match(path.name):
            continue
        try:
            found.append(Dataset.open(path.name, base))
        except PicollmError as error:
            if on_problem:
                on_problem(path.name, error)
    return found
