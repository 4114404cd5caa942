"""Memory of what comes and goes, given back to the system when it is gone: glibc's malloc would rather keep it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_M_MMAP_THRESHOLD = -3  # of `mallopt`, in glibc's malloc.h
_THRESHOLD_BYTES = 16 << 20


def return_large_blocks() -> None:
    """Let every block above 16 MiB be mapped for itself, for the rest of this process.

    glibc raises that limit to 32 MiB as such blocks are freed. Large tensors then share a heap that keeps its holes:
    with what `trim` gives back, some 200 MB in an export of a model of 135 M parameters. A limit below the size of
    usual matrices would cost more in fresh pages than it saves.
    """
    with _glibc() as libc:
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)


def trim() -> None:
    """Give the free pages of the heap back, before another process needs memory or this one's largest step begins."""
    with _glibc() as libc:
        libc.malloc_trim(0)


@contextlib.contextmanager
def _glibc() -> Iterator[Any]:
    """The C library; what another one lacks is left alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        yield ctypes.CDLL(None)
