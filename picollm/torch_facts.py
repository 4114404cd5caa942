"""What torch can do here, asked of a probe process once and kept in `BASE/machine.json`. [no torch]

The kept answer is valid for one build of torch, GPU driver and CPU; anything else about the machine that could change
what torch does (its environment, the visible GPUs) is part of the key too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from picollm import __version__
from picollm.errors import HostError, PicollmError
from picollm.files import read_json, sha256_json, write_json
from picollm.hardware import Machine
from picollm.run_dir import base_dir

CACHE_NAME = "machine.json"
SCHEMA = 3  # of what is kept; an answer of another shape is asked again
# A cold disk needs tens of seconds to load a CUDA build of torch.
PROBE_TIMEOUT_S = 180.0
REQUIREMENT = "torch>=2.9,<2.14"  # as in pyproject.toml, which a broken installation cannot be asked for
REINSTALL = f'install it again with `pip install --force-reinstall "{REQUIREMENT}"`'


def torch_version() -> str | None:
    """The installed version as its package says, without importing it; None when it is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def torch_facts(machine: Machine, base: Path | None = None) -> dict[str, Any]:
    """The probe's answer (its fields: `picollm.stages.probe.facts`), from the cache or from a probe run now.

    A cache that is damaged or belongs to another machine is ignored and replaced; one that cannot be written is no
    error.

    Args:
        base: folder of the cache; the base directory unless told.

    Raises:
        HostError: torch cannot be imported, or the probe died; the cause carries what was said last.
    """
    path, key = (base or base_dir()) / CACHE_NAME, _key(machine)
    if (facts := _read_cache(path, key)) is not None:
        return facts
    facts = run_probe()
    with contextlib.suppress(PicollmError, OSError):
        write_json(path, {"schema": SCHEMA, "key": key, "facts": facts})
    return facts


def run_probe() -> dict[str, Any]:
    """Start `python -m picollm.stages.probe` and read its answer.

    Raises:
        HostError: as in `torch_facts`.
    """
    command = [sys.executable, "-m", "picollm.stages.probe"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise HostError(
            "torch does not answer", cause=f"the probe took more than {PROBE_TIMEOUT_S:.0f} s", hint=REINSTALL
        ) from None
    except OSError as error:
        raise HostError("cannot start a Python process", cause=str(error), hint="free memory and try again") from error
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        facts = {}
    if done.returncode == 0 and "torch" in facts:
        return facts
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    cause = facts.get("error") or f"the probe ended with {ended}" + (f": {lines[-1]}" if lines else "")
    raise HostError("torch does not work in this Python", cause=cause, hint=REINSTALL)


def _key(machine: Machine) -> str:
    gpus = [[gpu.name, gpu.memory_bytes, gpu.driver] for gpu in machine.gpus]
    # A cuDNN on the library path shadows the one in torch's wheel and changes which kernels run.
    libraries = [os.environ.get(name, "") for name in ("LD_LIBRARY_PATH", "LD_PRELOAD")]
    return sha256_json([__version__, torch_version(), sys.prefix, machine.cpu_name, gpus, libraries])


def _read_cache(path: Path, key: str) -> dict[str, Any] | None:
    try:
        stored = read_json(path)
    except (PicollmError, OSError):
        return None
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or stored.get("key") != key:
        return None
    facts = stored.get("facts")
    return facts if isinstance(facts, dict) and "torch" in facts else None
