"""Where an export is while it is written and checked: under a temporary name beside the one that it will have."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from picollm.errors import HostError
from picollm.files import disk_errors


@contextlib.contextmanager
def unready(target: Path) -> Iterator[Path]:
    """A free name beside `target`, for a file or a folder; whatever has it afterwards is gone.

    What earlier exports of this target left when they were killed is swept.

    Raises:
        HostError: the folder that will hold it cannot be made.
    """
    path = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}.*.tmp"):
            pid = stale.name.removeprefix(f".{target.name}.").partition(".")[0]
            if stale == path or not _is_running(pid):
                _remove(stale)
    try:
        yield path
    finally:
        _remove(path)


def require_room(target: Path, needed: int, hint: str) -> None:
    """Raises HostError: an export of so many bytes does not fit on the disk of `target`."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise HostError(
            f"there is no room in `{target.parent}`",
            cause=f"the export needs {needed:,} bytes, {free:,} are free",
            hint=hint,
        )


def _is_running(pid: str) -> bool:
    """Whether the process that made something may still be writing to it."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
