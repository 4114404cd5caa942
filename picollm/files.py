"""Files of ours: written whole or not at all, hashed, and checked when they are read. Knows no run and no stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from picollm.errors import HostError, IntegrityError

SCHEMA = 1  # of every JSON file of ours; a reader refuses another


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on key order or white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_stats(folder: Path) -> list[os.stat_result]:
    """Size and time of every file below a folder; what vanishes meanwhile, as while a run saves there, is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.append(Path(parent, name).stat())
    return found


def fsync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk: a rename alone may not survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into a HostError that names the place."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write `{path}`",
            cause=error.strerror or str(error),
            hint="free room or set PICOLLM_BASE_DIR to a directory you can write; `picollm doctor` checks both",
        ) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename, fsync of the folder.

    Raises:
        HostError: the directory cannot be written or the disk is full.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def free_name(path: Path) -> Path:
    """`path` where nothing has that name yet, else the first of `path~2`, `path~3`, … that is free."""
    candidate, serial = path, 1
    while candidate.exists():
        serial += 1
        candidate = path.with_name(f"{path.name}~{serial}")
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs; whole or not at all, as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, hint: str = "restore it from a copy, or start a new run with `--run NAME`") -> Any:
    """Parse a JSON file of ours.

    Args:
        hint: what to do when it is torn.

    Raises:
        IntegrityError: it is not JSON (torn or edited by hand).
        FileNotFoundError: there is no such file; callers know which command makes it.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise IntegrityError(f"`{path}` is not readable JSON", cause=str(error), hint=hint) from error


def check_schema(path: Path, value: Any) -> dict[str, Any]:
    """Refuse a file written by a picollm with another layout of its files.

    Raises:
        IntegrityError: `schema` is missing or not ours.
    """
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise IntegrityError(
            f"`{path}` was written by another version of picollm",
            cause=f"its schema is {found!r}, this version reads {SCHEMA}",
            hint="use the picollm that made it, or start a new run with `--run NAME`",
        )
    return value


def read_fields(path: Path, fields: dict[str, type], *, hint: str) -> dict[str, Any]:
    """Read a JSON object of ours that holds certain fields; it may hold more.

    Args:
        fields: name -> type of the value as JSON gives it (dict, list, str, int).
        hint: what to do when it is torn or was edited.

    Raises:
        IntegrityError: torn, of another version, or a field is missing or of another type.
        FileNotFoundError: there is no such file.
    """
    value = check_schema(path, read_json(path, hint=hint))
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            found = f"of type {type(value[name]).__name__}" if name in value else "missing"
            raise IntegrityError(f"`{path}` is torn or was edited", cause=f"its field `{name}` is {found}", hint=hint)
    return value
