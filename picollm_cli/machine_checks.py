"""Checks of this machine: Python, packages, torch, device, cores, memory, disk. One function per check."""

from __future__ import annotations

import os
import sys
from typing import Any

from picollm.errors import ConfigError, HostError, first_line
from picollm.units import size
from picollm_cli.inspection import Check, Inspection, rate_text

DISTRIBUTION = "picollm-cli"
# Distributions whose import name is not their own with `_` for `-`.
IMPORT_NAMES = {"nvidia-ml-py": "pynvml"}
# The largest process of preset `demo` stays below this.
LEAST_MEMORY_BYTES = 1.5 * 2**30
LEAST_DISK_BYTES = 2**30


# -- Python and its packages ------------------------------------------------------------------------------------------


def check_python(_: Inspection) -> Check:
    version, wanted = ".".join(map(str, sys.version_info[:3])), (3, 11)
    if sys.version_info < wanted:
        return Check("python", "block", f"{version}; picollm needs 3.11 or newer", "make a venv with a newer Python")
    if sys.maxsize < 2**32:
        return Check("python", "block", f"{version}, 32 bits; torch exists for 64 only", "install a 64-bit Python")
    return Check("python", "ok", version)


def check_packages(_: Inspection) -> Check:
    from importlib import metadata

    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Check("packages", "block", "packaging is not installed", "`pip install packaging`")
    try:
        declared = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return Check(
            "packages", "warn", f"`{DISTRIBUTION}` is not installed, so its requirements are not known",
            "install it with `pip install -e .` in its checkout",
        )  # fmt: skip
    needed = [need for need in declared if need.marker is None or need.marker.evaluate({"extra": ""})]
    problems = [(need, problem) for need in needed if (problem := _package_problem(need))]
    if problems:
        names = " ".join(f'"{need}"' for need, _ in problems)
        return Check("packages", "block", "; ".join(text for _, text in problems), f"`pip install {names}`")
    return Check("packages", "ok", f"{len(needed)} required packages are installed and load")


def _package_problem(need: Any) -> str | None:
    """What is wrong with one required package. Everything but torch is really imported: files alone prove little."""
    import importlib
    import warnings
    from importlib import metadata

    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return f"{need.name} is not installed"
    if not need.specifier.contains(version, prereleases=True):
        return f"{need.name} {version} is installed, `{need.specifier}` is needed"
    if need.name == "torch":
        return None  # a second of work, and the check `torch` does it in a process of its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(IMPORT_NAMES.get(need.name, need.name.replace("-", "_")))
    except Exception as error:
        return f"{need.name} {version} does not load ({type(error).__name__}: {first_line(error)})"
    return None


def check_package_conflict(_: Inspection) -> Check:
    from importlib import metadata

    owners = set(metadata.packages_distributions().get("picollm", ()))
    # An unrelated project has this name on the package index; it may own no file of ours and still shadow the command.
    owners |= {dist.name for dist in metadata.distributions(name="picollm")}
    foreign = sorted(owners - {DISTRIBUTION})
    if foreign:
        return Check(
            "package.conflict", "warn", f"`{', '.join(foreign)}` is installed under the name `picollm` too",
            f"`pip uninstall {' '.join(foreign)}`, then install `{DISTRIBUTION}` again",
        )  # fmt: skip
    return Check("package.conflict", "ok", "no other distribution uses the name `picollm`")


def check_torch(at: Inspection) -> Check:
    from importlib import metadata

    from packaging.requirements import Requirement

    from picollm.torch_facts import REQUIREMENT, torch_version

    version = torch_version()
    if version is None:
        return Check("torch", "block", "torch is not installed", f'`pip install "{REQUIREMENT}"`')
    try:
        facts = at.torch
    except HostError as error:
        return Check("torch", "block", f"{version}: {error.cause}", error.hint)
    try:
        declared = [
            need for text in metadata.requires(DISTRIBUTION) or () if (need := Requirement(text)).name == "torch"
        ]
    except metadata.PackageNotFoundError:
        declared = []
    if any(not need.specifier.contains(version, prereleases=True) for need in declared):
        return Check("torch", "block", f"{version} is not `{declared[0].specifier}`", f'`pip install "{declared[0]}"`')
    compiler = facts["compile"]["compiler"] or "no C++ compiler"
    detail = f"{facts['torch']}, {facts['build']} build, {'gloo' if facts['distributed']['gloo'] else 'no gloo'}"
    detail += f"{', nccl' if facts['distributed']['nccl'] else ''}; torch.compile: {compiler}"
    return Check("torch", "ok", detail)


# -- compute ----------------------------------------------------------------------------------------------------------


def check_device(at: Inspection) -> Check:
    from picollm.gpu_specs import gpu_spec
    from picollm.hardware import detect_gpus

    machine = at.machine
    if not machine.gpus and (idle := detect_gpus()):
        return Check(
            "device",
            "warn",
            f"CPU: {machine.cpu_name}; {len(idle)} x {idle[0].name} is not used, because this torch is a CPU build",
            "install a CUDA build of torch that fits the driver to train on it",
        )
    if not machine.gpus:
        return Check("device", "info", f"CPU: {machine.cpu_name}; no CUDA GPU, presets `demo` and `cpu-small` fit it")
    gpu = machine.gpus[0]
    spec = gpu_spec(gpu.name)
    peak = f", {spec.peak_flops('bfloat16') / 1e12:.0f} TFLOP/s at best" if spec else ""
    detail = f"{len(machine.gpus)} x {gpu.name}, {size(gpu.memory_bytes)}{peak}, driver {gpu.driver}"
    cuda = at.torch["cuda"]
    if not cuda["available"]:
        why = "this torch is a CPU build" if at.torch["build"] == "cpu" else cuda["reason"]
        return Check(
            "device", "block", f"{detail}; torch cannot use it: {why}",
            "install a CUDA build of torch that fits the driver, or train on the CPU with `CUDA_VISIBLE_DEVICES=`",
        )  # fmt: skip
    if len({other.name for other in machine.gpus}) > 1:
        names = ", ".join(other.name for other in machine.gpus)
        return Check(
            "device",
            "warn",
            f"unequal GPUs ({names}): the slowest sets the pace",
            "pick equal ones with `CUDA_VISIBLE_DEVICES`",
        )
    return Check("device", "ok", detail)


def check_dtype(at: Inspection) -> Check:
    from picollm.plan import choose_dtype

    dtype, reason = choose_dtype(at.config, at.machine)
    # In float64, and in float16 on a CPU, nothing was tried.
    fact = at.torch[{"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32")]
    if fact and not fact["works"]:
        return Check("dtype", "block", f"{dtype}: {fact['error']}", "choose another with `--set train.dtype=float32`")
    fp32, bf16 = (at.torch[name]["flops_per_s"] for name in ("fp32", "bf16"))
    rates = f"; matrix products: float32 {rate_text(fp32)}, bfloat16 {rate_text(bf16)}"
    if dtype == "bfloat16" and bf16 and fp32 and bf16 < fp32:
        return Check(
            "dtype", "warn", f"{dtype}: {reason}{rates}; it is slower here", "leave it out: `--set train.dtype=auto`"
        )
    return Check("dtype", "ok", f"{dtype}: {reason}{rates}")


def check_attention(at: Inspection) -> Check:
    from picollm.attention_choice import AttentionDevice, Kernel, attention_for, mismatch
    from picollm.plan import choose_dtype
    from picollm.scaling import architecture

    facts, arch = at.torch["attention"], architecture(at.config, at.config.tokenizer.vocab_size)
    try:
        dtype, device = choose_dtype(at.config, at.machine)[0], AttentionDevice.from_json(facts["device"])
        documents = at.config.data.packing == "documents"
        choice = attention_for(arch, dtype, device, at.config.model.attention, documents=documents)
    except ConfigError as error:
        return Check("attention", "block", f"{error.message}: {error.cause}", error.hint)
    detail, backends = f"{choice}: {choice.reason}", dict.fromkeys(filter(None, (choice.full, choice.window)))
    for name in backends:
        if error := facts["broken"].get(name):
            fix = "choose another with `--set model.attention=…`"
            return Check("attention", "block", f"{detail}; {name} does not run here: {error}", fix)
    kernels = {name: Kernel(**seen) for name in backends if (seen := facts["kernels"].get(name))}
    if kernels:
        detail += f"; kernels that ran: {', '.join(str(kernel) for kernel in kernels.values())}"
    # Another kernel than the chosen one runs in silence, at half the speed.
    wrong = next(filter(None, (mismatch(name, kernel) for name, kernel in kernels.items())), choice.slow)
    return Check("attention", "warn", f"{detail}; {wrong[0]}", wrong[1]) if wrong else Check("attention", "ok", detail)


def check_cores(at: Inspection) -> Check:
    machine, plan = at.machine, at.plan
    detail = f"{machine.physical_cores} physical, {machine.logical_cores} logical; "
    detail += f"{plan.threads} thread{'s' if plan.threads != 1 else ''} for training ({plan.threads_reason})"
    if plan.threads > machine.logical_cores:
        return Check(
            "cores",
            "warn",
            f"{detail}: more threads than cores slow each other down",
            "lower `train.threads` or OMP_NUM_THREADS",
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * (os.cpu_count() or 1):
        return Check(
            "cores", "warn", f"{detail}; the machine is busy (load {load:.1f})", "expect longer times, or wait"
        )
    return Check("cores", "ok", detail)


# -- memory and disk --------------------------------------------------------------------------------------------------


def check_memory(at: Inspection) -> Check:
    from picollm.memory import copies_fit

    machine = at.machine
    detail = f"{size(machine.available_bytes)} of {size(machine.memory_bytes)} available"
    if machine.memory_bytes < LEAST_MEMORY_BYTES:
        return Check(
            "memory",
            "block",
            f"{detail}; the smallest preset needs {size(LEAST_MEMORY_BYTES)}",
            "use a larger machine or raise the container's memory limit",
        )
    if at.plan.device == "cpu" and machine.available_bytes < at.plan.memory_bytes:
        return Check(
            "memory",
            "warn",
            f"{detail} now; {at.subject} needs {size(at.plan.memory_bytes)}",
            "close other programs before you start",
        )
    if not copies_fit(at.plan.copies_bytes, machine.memory_bytes):
        return Check(
            "memory",
            "warn",
            f"{detail}; {at.subject} would take {size(at.plan.copies_bytes)} to save while its GPUs train on",
            "training waits while it saves; give the machine more memory where that takes too long",
        )
    return Check("memory", "ok", detail)


def check_disk_room(at: Inspection) -> Check:
    from picollm.hardware import disk_free
    from picollm.run_dir import base_dir
    from picollm_cli.prepare import disk_needed

    need = disk_needed(at.plan, at.run)
    free = disk_free(base_dir())
    detail = f"{size(free)} free, {at.subject} needs {size(need)}"
    if free < need:
        return Check("disk.room", "block", detail, "free room, or set PICOLLM_BASE_DIR to a larger disk")
    if free < need + LEAST_DISK_BYTES:
        return Check(
            "disk.room",
            "warn",
            f"{detail}: little would be left",
            "free room, or set PICOLLM_BASE_DIR to a larger disk",
        )
    return Check("disk.room", "ok", detail)


def check_disk_writable(_: Inspection) -> Check:
    """Write, flush to the disk, read back and remove one block: permission bits lie on network and full disks."""
    from picollm.run_dir import base_dir

    base = base_dir()
    probe, data = base / f".doctor.{os.getpid()}.tmp", os.urandom(4096)
    try:
        base.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            same = probe.read_bytes() == data
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        fix = "set PICOLLM_BASE_DIR to a directory you can write"
        return Check("disk.writable", "block", f"cannot write `{base}`: {error.strerror or error}", fix)
    if not same:
        return Check(
            "disk.writable", "block", f"`{base}` gives back other bytes than were written", "replace this disk"
        )
    return Check("disk.writable", "ok", "a file was written, synced and read back")


def check_base_dir(_: Inspection) -> Check:
    from picollm.run_dir import base_dir

    base = base_dir()
    source = next((name for name in ("PICOLLM_BASE_DIR", "XDG_DATA_HOME") if os.environ.get(name)), None)
    detail = f"{base} (from {source})" if source else f"{base} (the default; PICOLLM_BASE_DIR moves it)"
    if os.path.lexists(base) and not base.is_dir():
        return Check("base_dir", "block", f"{detail} is not a directory", "set PICOLLM_BASE_DIR to a directory")
    return Check("base_dir", "ok", detail)
