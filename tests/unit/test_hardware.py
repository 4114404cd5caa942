"""What is read from cpuinfo and NVML, and what follows from it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from picollm import gpu_specs, hardware
from picollm.gpu_specs import gpu_spec
from picollm.hardware import Gpu, Machine, compute_dtype, cpu_matmul_flops, default_threads, parse_cpuinfo

X86 = """\
processor\t: 0
model name\t: AMD EPYC 9R14
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
model name\t: AMD EPYC 9R14
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 2
model name\t: AMD EPYC 9R14
physical id\t: 1
core id\t\t: 0
flags\t\t: fpu avx2 avx512f avx512_bf16
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd bf16 sve
CPU implementer\t: 0x41
"""


@pytest.fixture
def machine() -> Machine:
    return Machine("Linux", "a CPU", frozenset({"avx2"}), 8, 16, 32 * 2**30, 16 * 2**30, ())


def a_gpu(capability: tuple[int, int], name: str = "NVIDIA H100 80GB HBM3") -> Gpu:
    return Gpu(0, name, 80 * 2**30, capability, "570.1")


def test_x86_cpuinfo_gives_name_flags_and_cores_of_two_sockets() -> None:
    info = parse_cpuinfo(X86)
    assert info.name == "AMD EPYC 9R14"
    assert info.flags == {"fpu", "avx2", "avx512f", "avx512_bf16"}
    # Two threads of one core, and a core of the same number in another socket.
    assert info.core_of == {0: ("0", "0"), 1: ("0", "0"), 2: ("1", "0")}


def test_arm_cpuinfo_has_features_and_no_cores() -> None:
    info = parse_cpuinfo(ARM)
    assert info.flags == {"fp", "asimd", "bf16", "sve"}
    assert (info.name, info.core_of) == ("", {})


def test_empty_cpuinfo_is_no_error() -> None:
    assert parse_cpuinfo("") == hardware.CpuInfo("", frozenset(), {})


def test_this_machine_has_plausible_figures() -> None:
    found = hardware.detect()
    assert 1 <= found.physical_cores <= found.logical_cores <= (os.cpu_count() or 1)
    assert 2**28 < found.available_bytes <= found.memory_bytes < 2**50
    assert found.system and found.cpu_name


def test_cores_follow_the_affinity_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(X86)
    monkeypatch.setattr(hardware, "PROC_CPUINFO", cpuinfo)
    monkeypatch.setattr(hardware, "container_cpus", lambda: None)
    counted = {}
    for allowed in ({0, 1}, {0, 2}, {0, 1, 2}):
        monkeypatch.setattr(hardware, "_allowed_cpus", lambda allowed=allowed: allowed)
        found = hardware.detect()
        counted[frozenset(allowed)] = (found.physical_cores, found.logical_cores)
    assert counted == {frozenset({0, 1}): (1, 2), frozenset({0, 2}): (2, 2), frozenset({0, 1, 2}): (2, 3)}


@pytest.mark.parametrize(("quota", "expected"), [(2.5, 2), (0.5, 1)])
def test_a_cpu_quota_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(hardware, "_allowed_cpus", lambda: set(range(64)))
    monkeypatch.setattr(hardware, "container_cpus", lambda: quota)
    found = hardware.detect()
    assert found.logical_cores == expected
    assert found.physical_cores <= expected


def test_a_container_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from picollm.cgroups import MemoryLimit

    monkeypatch.setattr(hardware, "container_memory", lambda: MemoryLimit(1000, 400))
    found = hardware.detect()
    assert (found.memory_bytes, found.available_bytes) == (1000, 400)


# -- dtype and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "dtype", "because"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "bfloat16", "`amx_bf16`"),
        ({"avx2", "avx512f", "avx512_bf16"}, "bfloat16", "`avx512_bf16`"),
        ({"avx2", "avx512f"}, "float32", "neither"),
        ({"asimd", "bf16"}, "float32", "neither"),
        (set(), "float32", "neither"),
    ],
)
def test_cpu_flags_decide_the_dtype(machine: Machine, flags: set[str], dtype: str, because: str) -> None:
    found, reason = compute_dtype(replace(machine, cpu_flags=frozenset(flags)))
    assert found == dtype
    assert because in reason


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), "float32"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((9, 0), "bfloat16"),
        ((12, 0), "bfloat16"),
    ],
)
def test_gpus_decide_before_the_cpu(machine: Machine, capability: tuple[int, int], dtype: str) -> None:
    with_gpu = replace(machine, gpus=(a_gpu(capability),), cpu_flags=frozenset({"amx_bf16"}))
    assert compute_dtype(with_gpu)[0] == dtype


def test_the_weakest_gpu_decides(machine: Machine) -> None:
    assert compute_dtype(replace(machine, gpus=(a_gpu((9, 0)), a_gpu((7, 0)))))[0] == "float16"
    assert compute_dtype(replace(machine, gpus=(a_gpu((9, 0)), a_gpu((6, 0)))))[0] == "float32"


@pytest.mark.parametrize(("capability", "can"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_fp8_needs_its_tensor_cores_on_every_gpu(machine: Machine, capability: tuple[int, int], can: bool) -> None:
    assert hardware.can_multiply_fp8(replace(machine, gpus=(a_gpu((9, 0)), a_gpu(capability)))) == can
    assert hardware.can_multiply_fp8(machine)  # a CPU imitates it


def test_threads_are_physical_cores_shared_by_ranks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads(machine) == (8, "8 physical cores")
    assert default_threads(machine, ranks=3)[0] == 2
    assert default_threads(machine, ranks=100)[0] == 1


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), ("0", 8), ("many", 8), ("", 8)])
def test_omp_num_threads_wins_when_it_is_a_number(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, value: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_threads(machine)[0] == threads


# -- GPUs -------------------------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML with three boards; the second shares the CPU's memory and reports none."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65"

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}1b2c3d4-0000"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("MIG-"))

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        if handle == 1:
            raise self.NVMLError("not supported")
        return SimpleNamespace(total=80 * 2**30, free=70 * 2**30)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"board {handle}"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["board 0", "board 1", "board 2"]),
        ("2,0", ["board 2", "board 0"]),
        ("GPU-11b2c3d4-0000", ["board 1"]),
        ("GPU-21,GPU-0", ["board 2", "board 0"]),
        ("GPU-,0", []),
        ("MIG-1", ["board 1"]),
        ("0,7,1", ["board 0"]),
        ("-1", []),
        ("", []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = hardware.detect_gpus()
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))
    assert all(gpu.driver == "580.65" and gpu.memory_bytes > 0 for gpu in gpus)


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName"])
def test_a_failing_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    nvml = FakeNvml()

    def fail(*_: object) -> None:
        raise nvml.NVMLError("driver/library version mismatch")

    monkeypatch.setattr(nvml, broken, fail)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.detect_gpus() == ()


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GB300", "GB300"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H800", "H800"),
        ("NVIDIA H800 PCIe", "H800 PCIe"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A30", "A30"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"),
        ("AMD Instinct MI350X", "MI350X"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("", None),
    ],
)
def test_driver_names_find_their_data_sheet(name: str, spec: str | None) -> None:
    found = gpu_spec(name)
    assert (found.name if found else None) == spec


def test_data_sheets_are_consistent() -> None:
    for _, spec in gpu_specs._GPUS:
        assert spec.usd_per_hour > 0
        assert spec.peak_flops("float32") == spec.fp32_flops
        # Chips without bfloat16 have no fp8 either; where there is both, fp8 is twice as fast.
        if spec.bf16_flops is None:
            assert spec.fp8_flops is None and spec.peak_flops("bfloat16") == spec.fp32_flops
            assert spec.peak_flops("float16") == spec.fp16_flops > spec.fp32_flops
        else:
            assert spec.fp16_flops is None and spec.peak_flops("float16") == spec.bf16_flops > spec.fp32_flops
        if spec.fp8_flops is not None:
            assert spec.fp8_flops == pytest.approx(2 * spec.bf16_flops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA L40S", 362, 733),
        ("NVIDIA GeForce RTX 4090", 165.2, 330),
        ("NVIDIA GeForce RTX 5090", 209.5, 419),
        ("AMD Instinct MI300X", 1307.4, 2614.9),
    ],
)
def test_dense_peaks_of_the_data_sheets(name: str, bf16: float, fp8: float | None) -> None:
    spec = gpu_spec(name)
    assert spec.bf16_flops == pytest.approx(bf16 * 1e12)
    assert spec.fp8_flops == (fp8 and pytest.approx(fp8 * 1e12))


def test_cpu_rates_rise_with_the_instruction_set(machine: Machine) -> None:
    sets = [set(), {"avx2"}, {"avx2", "avx512f"}, {"avx2", "avx512f", "avx512_bf16"}]
    sets.append(sets[-1] | {"amx_bf16"})
    machines = [replace(machine, cpu_flags=frozenset(flags)) for flags in sets]
    for dtype in ("float32", "bfloat16"):
        rates = [cpu_matmul_flops(m, dtype) for m in machines]
        assert rates == sorted(rates)
    # The type that is chosen is never the slower one.
    for m in machines:
        chosen = compute_dtype(m)[0]
        assert cpu_matmul_flops(m, chosen) == max(cpu_matmul_flops(m, "float32"), cpu_matmul_flops(m, "bfloat16"))


# -- disks ------------------------------------------------------------------------------------------------------------


def test_free_room_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    assert hardware.existing_parent(tmp_path / "a" / "b") == tmp_path
    assert hardware.disk_free(tmp_path / "a" / "b") == pytest.approx(hardware.disk_free(tmp_path), rel=0.1)
