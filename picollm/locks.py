"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from picollm.errors import HostError
from picollm.files import disk_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOOK_EVERY_S = 0.2  # while waiting without an end


@contextlib.contextmanager
def hold_lock(
    path: Path, what: str, *, wait_s: float = 0.0, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold an advisory lock for the life of the block; the kernel drops it when the process dies.

    Args:
        on_wait: waits without an end instead of `wait_s`; called several times a second with the pid of the process
            that holds the lock, and what it raises ends the wait.

    Raises:
        HostError: another process holds it after `wait_s`; its pid is named.
    """
    import filelock

    owner = path.with_name(path.name + ".owner")
    lock = filelock.FileLock(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while not _acquire(lock, wait_s if on_wait is None else LOOK_EVERY_S):
        pid = _pid_in(owner)
        if on_wait is None:
            raise HostError(
                f"{what} is in use by another process",
                cause=f"process {pid} holds `{path}`",
                hint=f"wait for it or stop it (`kill {pid}`), then run the same command again",
            )
        on_wait(pid)
    try:
        with disk_errors(path):
            owner.write_text(f"{os.getpid()}\n")
    except BaseException:
        lock.release()
        raise
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: BaseFileLock, timeout: float) -> bool:
    import filelock

    with disk_errors(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=timeout)
        except filelock.Timeout:
            return False
    return True


def _pid_in(owner: Path) -> str:
    """Who holds a lock, as it noted; it may be about to write or to remove its note."""
    try:
        return owner.read_text().strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
