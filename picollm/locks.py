"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from picollm.errors import HostError
from picollm.files import disk_errors


@contextlib.contextmanager
def hold_lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an advisory lock for the life of the block; the kernel drops it when the process dies.

    Raises:
        HostError: another process holds it after `wait_s`; its pid is named.
    """
    import filelock

    owner = path.with_name(path.name + ".owner")
    lock = filelock.FileLock(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait_s)
        except filelock.Timeout:
            pid = owner.read_text().strip() if owner.exists() else "unknown"
            raise HostError(
                f"{what} is in use by another process",
                cause=f"process {pid} holds `{path}`",
                hint=f"wait for it or stop it (`kill {pid}`), then run the same command again",
            ) from None
        try:
            owner.write_text(f"{os.getpid()}\n")
        except BaseException:
            lock.release()
            raise
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
