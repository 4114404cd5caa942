"""What happens in a stage, as append-only JSON lines: `{"v":1,"t":…,"stage":…,"kind":…, …}`.

Kinds and their fields:
    stage_start  attempt, resumed_from (step, 0 for a fresh start), total_steps
    step         step, loss, lr, tokens, tokens_per_s, mfu, grad_norm, mem_gib, dt_s
    eval         step, name, value, stderr, n
    sample       step, prompt, text
    checkpoint   step, path, bytes, dt_s (from the call to the commit)
    phase        text (what takes long before the first step; empty when it is over)
    note         text, level
    command      command, and what it was run by: code, packages, machine (as `environment.json`; in the run's file)
    stage_end    ok; when it is false, reason (`stopped` or the error's type) and perhaps text
Only rank 0 writes. After a crash steps repeat: `read_events` drops those that a later attempt overtook.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picollm.files import disk_errors

VERSION = 1
Event = dict[str, Any]


class EventWriter:
    """Appends events to one file; ends a line that a crash tore before it appends."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")
            if self._file.tell() > 0:
                with open(path, "rb") as reader:
                    reader.seek(-1, os.SEEK_END)
                    if reader.read(1) != b"\n":
                        self._file.write(b"\n")

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event and hand it to the system, so that the parent sees it at once."""
        event = {"v": VERSION, "t": round(time.time(), 3), "stage": self.stage, "kind": kind, **fields}
        # A non-finite number is not JSON; null keeps the line readable everywhere.
        event = {key: None if value != value or value in (_INF, -_INF) else value for key, value in event.items()}
        with disk_errors(self.path), _forgive_full_disk():
            self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        with disk_errors(self.path), _forgive_full_disk():
            self._file.close()


@contextlib.contextmanager
def _forgive_full_disk() -> Iterator[None]:
    """A line that finds no room must not end a training; saving says that the disk is full, and may find room later.

    The buffer keeps what could not be written, up to its size, so that no line is torn.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


_INF = float("inf")


def parse_line(line: bytes) -> Event | None:
    """One event, or None for a torn line, a foreign version or something else."""
    try:
        event = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return event if isinstance(event, dict) and event.get("v") == VERSION and "kind" in event else None


def read_all(path: Path) -> list[Event]:
    """Every readable event in file order, repeats included."""
    if not path.is_file():
        return []
    return [event for line in path.read_bytes().splitlines() if (event := parse_line(line))]


def read_events(path: Path) -> list[Event]:
    """Events as if no crash had happened: what an earlier attempt wrote above `resumed_from` is dropped."""
    kept: list[Event] = []
    for event in read_all(path):
        if event["kind"] == "stage_start":
            limit = event.get("resumed_from", 0)
            kept = [
                e
                for e in kept
                if not (e["kind"] in ("step", "eval", "sample", "checkpoint") and e.get("step", 0) > limit)
            ]
        kept.append(event)
    return kept


class EventFollower:
    """Reads what was appended to a file since the last call; the parent polls it ten times a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._rest = b""

    def poll(self) -> Iterator[Event]:
        """The events whose lines were finished since the last call."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if event := parse_line(line):
                yield event


def attempts(path: Path) -> int:
    """How often the stage has been started so far."""
    return sum(event["kind"] == "stage_start" for event in read_all(path))
