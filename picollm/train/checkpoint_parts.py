"""What the ranks of one save tell each other, and the index of all their parts. Files only: no torch, no collectives.

A save runs beside the training, whose collectives must not be mixed with others. So each rank leaves a note beside
its file, rank 0 looks for the notes, and the others look whether rank 0 has renamed the folder away.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from picollm.errors import HostError, IntegrityError, WorkerError
from picollm.files import disk_errors, read_json
from picollm.train.checkpoint_files import RESTORE

INDEX = "state/index.json"
# Ranks finish their parts within seconds of each other; one that takes longer than this is gone or elsewhere.
PEER_TIMEOUT_S = 600.0
POLL_S = 0.05
PART_PATTERN = re.compile(r"^rank_(0|[1-9][0-9]{0,6})-of-[1-9][0-9]{0,6}\.safetensors\Z")
MAX_DIMENSIONS = 8


def part_name(rank: int, world: int) -> str:
    """File of one rank's share of the training state, in a checkpoint's `state/`."""
    return f"rank_{rank}-of-{world}.safetensors"


@dataclass(frozen=True)
class Part:
    """What one rank has written: its file and what is in it.

    Attributes:
        tensors: name -> `{"shape": global shape, "rows": [first, end]}`.
    """

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, dict[str, list[int]]]


# -- between the ranks of a save --------------------------------------------------------------------------------------


def _note(temporary: Path, file: str) -> Path:
    return temporary / "state" / f"{file}.note"


def announce(temporary: Path, part: Part) -> None:
    """Tell rank 0 that a rank's file is complete and on the disk."""
    _leave(_note(temporary, part.file), asdict(part))


def announce_failure(temporary: Path, file: str, error: str) -> None:
    """Tell rank 0 that a rank's file will never be complete, and why."""
    _leave(_note(temporary, file), {"error": error})


def _leave(note: Path, value: dict[str, Any]) -> None:
    """Make a note appear whole. It lives for seconds: nothing is fsynced, and rank 0 may take the folder at once."""
    unfinished = note.with_suffix(".writing")
    with disk_errors(note):
        unfinished.write_text(json.dumps(value))
        os.replace(unfinished, note)


def await_parts(temporary: Path, files: list[str], *, timeout_s: float = PEER_TIMEOUT_S) -> list[Part]:
    """Wait until other ranks have announced their files; their notes are removed.

    Raises:
        HostError: a rank could not write its file.
        WorkerError: a rank did not say anything in time.
    """
    deadline = time.monotonic() + timeout_s
    parts: list[Part] = []
    for file in files:
        while (part := _announced(temporary, file)) is None:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{_rank_of(file)} has not written its part of `{temporary}`",
                    cause=f"nothing of it could be seen there for {timeout_s:.0f} s",
                    hint="put the run on a disk that all machines share, and look at that rank's log",
                )
            time.sleep(POLL_S)
        parts.append(part)
    for file in files:
        _note(temporary, file).unlink()
    return parts


def _rank_of(file: str) -> str:
    return file.partition("-")[0].replace("_", " ")


def _announced(temporary: Path, file: str) -> Part | None:
    """The part of a rank, once its note and all bytes of its file can be seen from here."""
    try:
        told = read_json(_note(temporary, file))
        if "error" in told:
            raise HostError(
                f"{_rank_of(file)} could not write its part of `{temporary}`",
                cause=told["error"],
                hint="free room, or set PICOLLM_BASE_DIR to a larger disk",
            )
        part = Part(**told)
        seen = (temporary / "state" / file).stat().st_size
    except FileNotFoundError:
        return None
    return part if seen == part.bytes else None  # a network disk may show the note before the last bytes


def await_end(
    temporary: Path, *, timeout_s: float = PEER_TIMEOUT_S, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Wait until rank 0 has committed a checkpoint or given it up: either way its temporary folder is gone.

    Args:
        stopped: whether this rank was asked to end. It then waits no longer: its part is written, and a rank 0 that
            has died would keep it here.

    Raises:
        WorkerError: it takes too long.
    """
    deadline = time.monotonic() + timeout_s
    while temporary.exists() and not stopped():
        if time.monotonic() > deadline:
            raise WorkerError(
                f"rank 0 has not completed `{temporary}`",
                cause=f"the folder was still there after {timeout_s:.0f} s",
                hint="look at the log of rank 0",
            )
        time.sleep(POLL_S)


# -- the index of all parts -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where a tensor of the training state is.

    Attributes:
        shape: of the whole tensor.
        parts: (first row, end row, file), in the order of rows, without gap or overlap. A scalar has one row.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[int, int, str], ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1


def build_index(parts: list[Part]) -> dict[str, Any]:
    """The content of `index.json`: for each tensor its global shape and the files of its rows."""
    index: dict[str, Any] = {}
    for part in parts:
        for name, where in part.tensors.items():
            entry = index.setdefault(name, {"shape": where["shape"], "parts": []})
            assert entry["shape"] == where["shape"], name
            entry["parts"].append({"file": part.file, "rows": where["rows"]})
    for entry in index.values():
        entry["parts"].sort(key=lambda part: part["rows"])
    return dict(sorted(index.items()))


def read_index(path: Path) -> dict[str, Entry]:
    """The index of a checkpoint folder. Nothing in it is trusted: it may come from anywhere.

    Raises:
        IntegrityError: missing or torn, or rows are missing or there twice, or a file has a name that we do not give.
    """
    file = path / INDEX
    try:
        value = read_json(file, hint=RESTORE)
    except OSError as error:
        raise IntegrityError(f"`{file}` cannot be read", cause=str(error), hint=RESTORE) from error
    if not isinstance(value, dict):
        raise _edited(file, "it is not an object")
    return {name: _entry(file, name, entry) for name, entry in value.items()}


def _entry(file: Path, name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict):
        raise _edited(file, f"`{name}` is not an object")
    shape = entry.get("shape")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _edited(file, f"`{name}` has no shape")
    # Until several ranks could save, a tensor had one file and its fields stood here.
    parts = entry.get("parts", [{"file": entry.get("file"), "rows": entry.get("rows")}])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _edited(file, f"`{name}` has no list of parts")
    found: list[tuple[int, int, str]] = []
    end = 0
    for part in parts:
        rows, where = part.get("rows"), part.get("file")
        if not isinstance(where, str) or not PART_PATTERN.match(where):
            raise _edited(file, f"`{name}` is in {where!r}, which is no file of a training state")
        if not _whole_numbers(rows) or len(rows) != 2 or rows[0] >= rows[1]:
            raise _edited(file, f"`{name}` has no rows in `{where}`")
        if rows[0] != end or where in {known for _, _, known in found}:
            raise _edited(file, f"rows {end} to {rows[0]} of `{name}` are missing or there twice")
        found.append((rows[0], rows[1], where))
        end = rows[1]
    result = Entry(tuple(shape), tuple(found))
    if end != result.num_rows:
        raise _edited(file, f"`{name}` has {result.num_rows} rows and {end} are there")
    return result


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _edited(file: Path, cause: str) -> IntegrityError:
    return IntegrityError(f"`{file}` is torn or was edited", cause=cause, hint=RESTORE)
