"""Limits of containers, read from the files that the kernel shows in each version."""

from __future__ import annotations

from pathlib import Path

import pytest

from picollm.cgroups import MemoryLimit, container_cpus, container_memory

GIB = 2**30


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "self-cgroup"


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_version_2_limit_counts_reclaimable_cache_as_available(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/\n")
    write(
        tmp_path, cgroup__controllers="cpu memory", memory__max=4 * GIB, memory__current=3 * GIB,
        memory__stat=f"anon 12\ninactive_file {GIB}",
    )  # fmt: skip
    assert container_memory(tmp_path, membership) == MemoryLimit(4 * GIB, 2 * GIB)


def test_the_tightest_group_above_the_process_counts(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/job/step\n")
    write(tmp_path, cgroup__controllers="memory")
    write(tmp_path / "job", memory__max=2 * GIB, memory__current=GIB, memory__stat="inactive_file 0")
    write(tmp_path / "job/step", memory__max="max", memory__current=GIB)
    assert container_memory(tmp_path, membership) == MemoryLimit(2 * GIB, GIB)


def test_version_1_inside_a_container_that_does_not_see_its_path(tmp_path: Path, membership: Path) -> None:
    membership.write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    write(
        tmp_path / "memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB // 2,
        memory__stat="total_inactive_file 0",
    )  # fmt: skip
    write(tmp_path / "cpu", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert container_memory(tmp_path, membership) == MemoryLimit(GIB, GIB // 2)
    assert container_cpus(tmp_path, membership) == 1.5


def test_no_limit_in_either_version(tmp_path: Path, membership: Path) -> None:
    membership.write_text("4:memory:/x\n1:cpu:/x\n0::/\n")
    write(tmp_path / "memory" / "x", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1)
    write(tmp_path / "cpu" / "x", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    write(tmp_path, cgroup__controllers="", memory__max="max", cpu__max="max 100000")
    assert container_memory(tmp_path, membership) is None
    assert container_cpus(tmp_path, membership) is None


def test_version_2_cpu_quota(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/a\n")
    write(tmp_path, cgroup__controllers="cpu")
    write(tmp_path / "a", cpu__max="250000 100000")
    assert container_cpus(tmp_path, membership) == 2.5


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert container_memory(tmp_path, tmp_path / "missing") is None
    assert container_cpus(tmp_path, tmp_path / "missing") is None
