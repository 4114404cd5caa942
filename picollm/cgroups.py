"""Limits that control groups (Docker, Kubernetes, SLURM) put on this process: memory and CPU time.

psutil and `os.cpu_count` report the host; a container that ignores its limits is killed or throttled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """What processes of a group may use together, and what of it is left now."""

    limit_bytes: int
    available_bytes: int


def container_memory(root: Path | None = None, membership: Path | None = None) -> MemoryLimit | None:
    """The tightest memory limit of the control groups around this process, version 2 or 1; None without one.

    Args:
        root: where control groups are mounted.
        membership: `/proc/self/cgroup`, which says where in the tree this process is.
    """
    limits = []
    for folder, version in _cgroups("memory", root or CGROUP_ROOT, membership or PROC_CGROUP):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = _read_int(folder / names[0]), _read_int(folder / names[1])
        # Version 1 writes "no limit" as the largest multiple of the page size that fits 63 bits.
        if limit is None or limit >= 1 << 62:
            continue
        # Cached file pages count as used, but the kernel gives them back before it refuses memory.
        reclaimable = _read_stat(folder / "memory.stat", names[2])
        limits.append(MemoryLimit(limit, min(limit, max(0, limit - (used or 0) + reclaimable))))
    if not limits:
        return None
    return MemoryLimit(min(x.limit_bytes for x in limits), min(x.available_bytes for x in limits))


def container_cpus(root: Path | None = None, membership: Path | None = None) -> float | None:
    """CPUs' worth of time that the control groups grant (`docker run --cpus`); None without a quota."""
    quotas = []
    for folder, version in _cgroups("cpu", root or CGROUP_ROOT, membership or PROC_CGROUP):
        if version == 2:
            quota, period = [*_read_words(folder / "cpu.max"), "", ""][:2]
        else:
            quota, period = (" ".join(_read_words(folder / f"cpu.cfs_{kind}_us")) for kind in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroups(controller: str, root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's group and its parents, with the cgroup version."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = [*line.split(":", 2), "", ""][:3]
        if controllers == "" and (root / "cgroup.controllers").is_file():
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        # Inside a container the path may be the host's and not be mounted; its parents, at least the top, are.
        parts = [part for part in place.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            if (folder := top.joinpath(*parts[:depth])).is_dir():
                yield folder, version


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _read_int(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _read_stat(path: Path, key: str) -> int:
    words = _read_words(path)
    return int(words[words.index(key) + 1]) if key in words else 0
