"""Writes a dataset beside its final place and moves it there when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from picollm import __version__
from picollm.data.conversations import Conversation
from picollm.data.dataset_record import RECORD_NAME, SPLITS, Kind, ShardFile, Split
from picollm.data.datasets import Dataset
from picollm.errors import ConfigError
from picollm.files import SCHEMA, disk_errors, free_name, fsync_path, sha256_file, write_json
from picollm.run_dir import check_name, datasets_dir

ROW_GROUP_ROWS = 1024
# A row group is also closed by size, so that a thousand huge documents are never in memory together.
ROW_GROUP_BYTES = 16 << 20
SHARD_BYTES = 64 << 20
OLD_FOLDER = ".old"
_TEMPORARY = re.compile(r"^\..+?\.(\d+)(?:\.scratch)?\.tmp$")


class _Shards:
    """The shards of one split: rows go in, files of about 64 MiB of text come out."""

    def __init__(self, folder: Path, split: Split, kind: Kind) -> None:
        self.files: list[ShardFile] = []
        self._folder, self._split, self._kind = folder, split, kind
        self._buffer: list[str] = []
        self._sink: Any = None
        self._reset()

    def _reset(self) -> None:
        self._rows = self._chars = self._shard_bytes = self._buffer_bytes = 0

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files) + self._rows

    @property
    def _path(self) -> Path:
        suffix = "parquet" if self._kind == "text" else "jsonl"
        return self._folder / f"{self._split}-{len(self.files):05d}.{suffix}"

    def add(self, line: str, num_chars: int, num_bytes: int) -> None:
        self._buffer.append(line)
        self._rows += 1
        self._chars += num_chars
        self._shard_bytes += num_bytes
        self._buffer_bytes += num_bytes
        if len(self._buffer) >= ROW_GROUP_ROWS or self._buffer_bytes >= ROW_GROUP_BYTES:
            self._flush()
        if self._shard_bytes >= SHARD_BYTES:
            self.close()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._kind == "text":
            import pyarrow as pa
            import pyarrow.parquet as pq

            # large_string: a row group of a few giant documents may pass 2 GiB.
            schema = pa.schema([("text", pa.large_string())])
            if self._sink is None:
                # Checksums per page: readers notice damage that a file's size does not show.
                self._sink = pq.ParquetWriter(
                    self._path, schema, compression="zstd", use_dictionary=False, write_statistics=False,
                    write_page_checksum=True,
                )  # fmt: skip
            self._sink.write_table(pa.table({"text": self._buffer}, schema=schema), row_group_size=ROW_GROUP_ROWS)
        else:
            if self._sink is None:
                self._sink = open(self._path, "w", encoding="utf-8", newline="\n")
            self._sink.writelines(self._buffer)
        self._buffer.clear()
        self._buffer_bytes = 0

    def close(self) -> None:
        """Finish the current shard: on disk for good, hashed and noted."""
        self._flush()
        if self._sink is None:
            return
        path = self._path
        self.abandon()
        fsync_path(path)
        size, digest = path.stat().st_size, sha256_file(path)
        self.files.append(ShardFile(path.name, self._split, self._rows, size, self._chars, digest))
        self._reset()

    def abandon(self) -> None:
        """Let go of the open file without caring what is in it."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None


class DatasetWriter:
    """Context manager around `datasets/.NAME.PID.tmp`; leaving it without `publish` removes every trace.

    Raises:
        HostError: the folder cannot be written or the disk is full.
    """

    def __init__(self, name: str, base: Path | None = None) -> None:
        self.name = check_name("dataset", name)
        self._base = base
        self._parent = datasets_dir(base)
        self._temporary = self._parent / f".{name}.{os.getpid()}.tmp"
        self._shards: dict[Split, _Shards] = {}
        self._kind: Kind = "text"

    def __enter__(self) -> DatasetWriter:
        with disk_errors(self._parent):
            self._parent.mkdir(parents=True, exist_ok=True)
            sweep(self._parent)
        return self

    @property
    def scratch(self) -> Path:
        """A folder for what is needed only while the dataset is made; it goes with everything else."""
        folder = self._temporary.with_name(self._temporary.name.replace(".tmp", ".scratch.tmp"))
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def start(self, kind: Kind) -> None:
        """Begin with an empty folder."""
        self._kind = kind
        with disk_errors(self._temporary):
            self._temporary.mkdir()
        self._shards = {split: _Shards(self._temporary, split, kind) for split in SPLITS}

    def add(self, split: Split, row: str | Conversation) -> None:
        """Append a document or a conversation, whichever `start` announced."""
        line, num_chars = (row, len(row)) if isinstance(row, str) else (conversation_line(row), row.num_chars)
        self.add_line(split, line, num_chars, len(line.encode()))

    def add_line(self, split: Split, line: str, num_chars: int, num_bytes: int) -> None:
        """As `add`, of a row that is known already: a document, or what `conversation_line` made.

        Args:
            num_chars: of its text.
            num_bytes: of the line in UTF-8.
        """
        with disk_errors(self._temporary):
            self._shards[split].add(line, num_chars, num_bytes)

    def rows(self, split: Split) -> int:
        return self._shards[split].rows

    def publish(
        self,
        source: dict[str, Any],
        *,
        rejected: dict[str, int] | None = None,
        existing: Literal["keep", "move", "delete"] = "keep",
    ) -> tuple[Dataset, Path | None]:
        """Write the record and give the folder its name.

        Args:
            source: where the rows come from; part of the dataset's identity, so no time and no path of this machine.
            rejected: input rows that were left out, by reason.
            existing: what happens to a dataset that has the name: nothing and an error, into `.old/`, or removed.

        Returns:
            The dataset, and where an older one was moved to.

        Raises:
            ConfigError: the name is taken and `existing` is "keep".
        """
        with disk_errors(self._temporary):
            for shards in self._shards.values():
                shards.close()
        files = [file for split in SPLITS for file in self._shards[split].files]
        totals: dict[str, Any] = {
            key: sum(getattr(file, key) for file in files) for key in ("rows", "bytes", "chars")
        } | {"rejected": rejected or {}}
        record = {
            "schema": SCHEMA, "name": self.name, "kind": self._kind, "source": source, "created_by": __version__,
            "files": [file.to_json() for file in files], "totals": totals,
        }  # fmt: skip
        write_json(self._temporary / RECORD_NAME, record)
        final = self._parent / self.name
        with disk_errors(final):
            fsync_path(self._temporary)
            moved = None
            if final.exists():
                if existing == "keep":
                    raise name_taken(self.name)
                moved = self._move_old(final)
            self._temporary.rename(final)
            fsync_path(self._parent)
            if moved and existing == "delete":
                shutil.rmtree(moved)
                moved = None
        return Dataset.open(self.name, self._base), moved

    def _move_old(self, final: Path) -> Path:
        target = free_name(self._parent / OLD_FOLDER / f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        target.parent.mkdir(exist_ok=True)
        final.rename(target)
        return target

    def _abandon(self) -> None:
        for shards in self._shards.values():
            with contextlib.suppress(OSError):  # a full disk may refuse even the close; the file goes anyway
                shards.abandon()
        self._shards = {}
        for folder in self._parent.glob(f".{self.name}.{os.getpid()}.*tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()


def conversation_line(conversation: Conversation) -> str:
    """A conversation as its line in a shard."""
    return json.dumps(conversation.to_json(), ensure_ascii=False) + "\n"


def name_taken(name: str) -> ConfigError:
    """The error for a dataset that would replace another one unasked."""
    return ConfigError(
        f"there is a dataset `{name}` already",
        cause="it was made from other files or with other settings",
        hint="choose another name, or add `--force`, which keeps the old one under `datasets/.old/`",
    )


def sweep(parent: Path) -> None:
    """Remove what killed imports left behind: temporary folders of processes that are gone."""
    for path in parent.glob(".*.tmp"):
        match = _TEMPORARY.match(path.name)
        # Our own pid on a leftover means that an earlier process had it, as happens in containers.
        if match and path.is_dir() and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
