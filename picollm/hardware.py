"""What this machine is: CPU, cores, memory, GPUs, disks, and what its chips can do at best.

Facts come from `/proc/cpuinfo`, psutil, cgroups and NVML; torch is never imported, so asking is cheap. Whether torch
can really use a GPU is another question; `picollm.stages.probe` answers it.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from picollm.cgroups import container_cpus, container_memory

PROC_CPUINFO = Path("/proc/cpuinfo")
# Flags of CPUs that multiply bfloat16 in hardware; elsewhere torch converts to float32 and back, which is slower.
BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16")
BF16_CAPABILITY = (8, 0)
# Volta and Turing multiply float16 in tensor cores; older chips gain nothing from it.
FP16_CAPABILITY = (7, 0)
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as its driver reports it; `index` is torch's, after `CUDA_VISIBLE_DEVICES`."""

    index: int
    name: str
    memory_bytes: int
    capability: tuple[int, int]
    driver: str


@dataclass(frozen=True)
class Machine:
    """What a process started here may use: cores after affinity and quota, memory after the container's limit.

    `gpus` is empty where torch is a CPU build, whatever the driver says; `detect_gpus` still finds them.
    """

    system: str
    cpu_name: str
    cpu_flags: frozenset[str]
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]


def detect() -> Machine:
    """Look at this machine. Takes milliseconds; a missing or broken GPU driver means no GPUs, not an error."""
    import psutil

    cpu = _cpu_info()
    allowed = _allowed_cpus()
    logical = len(allowed) if allowed else psutil.cpu_count(logical=True) or 1
    cores = {cpu.core_of[number] for number in allowed or () if number in cpu.core_of}
    physical = min(len(cores) or psutil.cpu_count(logical=False) or logical, logical)
    if quota := container_cpus():
        # A quota of 1.5 CPUs keeps one thread busy; a second one would be throttled for half of its time.
        logical = max(1, min(logical, math.floor(quota)))
        physical = min(physical, logical)
    total, available = host_memory()
    return Machine(
        system=platform.system(),
        cpu_name=cpu.name,
        cpu_flags=cpu.flags,
        physical_cores=physical,
        logical_cores=logical,
        memory_bytes=total,
        available_bytes=available,
        gpus=detect_gpus() if torch_drives_gpus() else (),
    )


def host_memory() -> tuple[int, int]:
    """Bytes of memory that processes here may use, and those of them that are free now; within a container's limit."""
    import psutil

    memory, limit = psutil.virtual_memory(), container_memory()
    if limit is None:
        return memory.total, memory.available
    return min(memory.total, limit.limit_bytes), min(memory.available, limit.available_bytes)


# -- CPU --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuInfo:
    """`core_of` maps a logical CPU to its physical core as (socket, core); empty where the kernel does not say."""

    name: str
    flags: frozenset[str]
    core_of: dict[int, tuple[str, str]]


def parse_cpuinfo(text: str) -> CpuInfo:
    """Read the text of Linux's `/proc/cpuinfo`, x86 (`flags`) or ARM (`Features`)."""
    name, flags = "", frozenset[str]()
    core_of: dict[int, tuple[str, str]] = {}
    for block in text.split("\n\n"):
        fields = {}
        for line in block.splitlines():
            key, colon, value = line.partition(":")
            if colon:
                fields[key.strip()] = value.strip()
        name = name or fields.get("model name", "")
        flags = flags or frozenset(fields.get("flags", fields.get("Features", "")).split())
        if fields.get("processor", "").isdigit() and "core id" in fields:
            core_of[int(fields["processor"])] = (fields.get("physical id", "0"), fields["core id"])
    return CpuInfo(name, flags, core_of)


def _cpu_info() -> CpuInfo:
    if PROC_CPUINFO.is_file():
        info = parse_cpuinfo(PROC_CPUINFO.read_text(errors="replace"))
        return CpuInfo(info.name or platform.machine(), info.flags, info.core_of)
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    if platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string") or name
        # Apple silicon has no such list; Intel Macs name their extensions in two places.
        listed = f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}"
        flags = frozenset(listed.lower().replace("avx1.0", "avx").split())
    return CpuInfo(name, flags, {})


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _allowed_cpus() -> set[int] | None:
    """Logical CPUs this process may run on; None where the system has no such mask (macOS)."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def usable_cpus() -> int:
    """Processes that can compute side by side here: the CPUs of this process, within the quota of its container."""
    allowed = _allowed_cpus()
    logical = len(allowed) if allowed else os.cpu_count() or 1
    quota = container_cpus()
    return max(1, min(logical, math.floor(quota))) if quota else logical


# -- GPUs -------------------------------------------------------------------------------------------------------------


def detect_gpus() -> tuple[Gpu, ...]:
    """CUDA devices that `CUDA_VISIBLE_DEVICES` leaves visible, through NVML; none when anything about it fails."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, a driver that does not match its kernel module: all mean no GPU
        return ()
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return tuple(_read_gpu(pynvml, index, handle, driver) for index, handle in enumerate(_visible(pynvml)))
    except Exception:
        return ()
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def torch_drives_gpus() -> bool:
    """False when the installed torch is a CPU build; asks its `version.py`, because importing torch takes seconds.

    The version's ending does not tell: wheels of the package index carry none, with CUDA or without.
    """
    try:
        path = metadata.distribution("torch").locate_file("torch/version.py")
        found = re.search(r"^cuda\b[^=\n]*=\s*(\S+)", Path(str(path)).read_text(encoding="utf-8"), re.MULTILINE)
    except (metadata.PackageNotFoundError, OSError, UnicodeDecodeError):
        return True  # not known; the checks of torch itself say what is wrong
    return found is None or found[1] != "None"


def _visible(nvml: object) -> Iterator[object]:
    """NVML handles in torch's order. CUDA stops at the first entry of the variable that it does not know."""
    count = nvml.nvmlDeviceGetCount()
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    for entry in map(str, range(count)) if wanted is None else wanted.split(","):
        entry = entry.strip()
        if entry.isdigit() and int(entry) < count:
            yield nvml.nvmlDeviceGetHandleByIndex(int(entry))
        elif entry.startswith("GPU-") and len(named := _named(nvml, count, entry)) == 1:
            yield named[0]
        elif entry.startswith("MIG-"):
            yield nvml.nvmlDeviceGetHandleByUUID(entry)
        else:
            return


def _named(nvml: object, count: int, start: str) -> list[object]:
    """Boards whose UUID begins so: CUDA takes as much of one as tells it from the others, NVML only all of it."""
    found = []
    for index in range(count):
        with contextlib.suppress(nvml.NVMLError):  # a board that fell off its bus
            board = nvml.nvmlDeviceGetHandleByIndex(index)
            if _text(nvml.nvmlDeviceGetUUID(board)).startswith(start):
                found.append(board)
    return found


def _read_gpu(nvml: object, index: int, handle: object, driver: str) -> Gpu:
    try:
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        # Chips that share the CPU's memory report none of their own.
        import psutil

        total = psutil.virtual_memory().total
    capability = tuple(int(x) for x in nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return Gpu(index, _text(nvml.nvmlDeviceGetName(handle)), total, capability[:2], driver)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


# -- decisions --------------------------------------------------------------------------------------------------------


def weakest_capability(machine: Machine) -> tuple[int, int]:
    """The lowest compute capability among the GPUs, which decides for all of them; there must be one."""
    return min(gpu.capability for gpu in machine.gpus)


def compute_dtype(machine: Machine) -> tuple[str, str]:
    """The type of forward and backward pass and why, from what the chip is and never from a timing.

    A timing would differ from start to start, and the type is part of a run's recipe.

    Returns:
        ("bfloat16" | "float16" | "float32", reason for a human)
    """
    if machine.gpus:
        major, minor = capability = weakest_capability(machine)
        known = f"compute capability {major}.{minor}"
        if capability >= BF16_CAPABILITY:
            return "bfloat16", f"the GPU has bfloat16 tensor cores ({known})"
        if capability >= FP16_CAPABILITY:
            return "float16", f"the GPU has float16 tensor cores and no bfloat16 ({known}); the loss is scaled"
        return "float32", f"the GPU has no tensor cores ({known}, they begin at 7.0)"
    for flag in BF16_CPU_FLAGS:
        if flag in machine.cpu_flags:
            return "bfloat16", f"the CPU multiplies bfloat16 in hardware (`{flag}`)"
    return "float32", "the CPU has neither `amx_bf16` nor `avx512_bf16`"


def can_multiply_fp8(machine: Machine) -> bool:
    """Whether every GPU has 8-bit tensor cores; a CPU computes the same, slowly, so it can."""
    return not machine.gpus or weakest_capability(machine) >= FP8_CAPABILITY


def default_threads(machine: Machine, ranks: int = 1) -> tuple[int, str]:
    """CPU threads for each of `ranks` processes and why: `OMP_NUM_THREADS`, else an equal share of physical cores."""
    # OpenMP allows a list, one number per nesting level; the first is what torch uses.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked), "OMP_NUM_THREADS"
    shared = f" shared by {ranks} processes" if ranks > 1 else ""
    cores = f"{machine.physical_cores} physical core{'s' if machine.physical_cores != 1 else ''}"
    return max(1, machine.physical_cores // ranks), f"{cores}{shared}"


def disk_free(path: Path) -> int:
    """Bytes that this user may still write where `path` is or would be made."""
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    """`path` itself or the nearest folder above it that exists and may be looked at."""
    path = path.absolute()
    while path != path.parent:
        with contextlib.suppress(PermissionError):
            if path.exists():
                break
        path = path.parent
    return path


def cpu_matmul_flops(machine: Machine, dtype: str) -> float:
    """FLOP/s of one thread in the matrix products of a training step; plans use it where nothing was measured.

    Counts six operations per matrix weight and token plus attention; what comes beside the products is
    `estimate.CPU_TIME_PER_CHANNEL_S`. Zen 4 fitted on steps of `demo` and `cpu-small`, one thread, torch 2.13, 2026-11,
    where a bare product of large matrices reaches 200 GFLOP/s in bfloat16 and 89 in float32. AMX is taken to be no
    slower; the rows for AVX2 and everything else are guesses to the low side.

    Raises:
        KeyError: a dtype that no plan has.
    """
    flags = machine.cpu_flags
    if "amx_bf16" in flags:
        bf16, fp32 = 165e9, 70e9
    elif "avx512f" in flags:
        bf16, fp32 = (165e9 if "avx512_bf16" in flags else 25e9), 70e9
    elif "avx2" in flags:
        bf16, fp32 = 15e9, 30e9
    else:
        bf16, fp32 = 10e9, 20e9
    # No CPU in use here multiplies float16 as such; it is converted on the way.
    return {"bfloat16": bf16, "float16": 10e9, "float32": fp32, "float64": fp32 / 2}[dtype]
