"""Facts about the place and the command that make a run, for its record."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from picollm.files import SCHEMA

_SECRET_NAME = re.compile(r"(?i)(^|[-_.])(token|secret|password|passwd|api[-_]?key|credentials?)$")
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")


def environment() -> dict[str, Any]:
    """What goes into `environment.json`: versions, commit, machine, command line without secrets, time (UTC)."""
    from importlib.metadata import PackageNotFoundError, version

    from picollm import __version__
    from picollm.hardware import detect

    machine = detect()
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = None
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "picollm": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch_version,
        "system": platform.platform(),
        "cpu": machine.cpu_name,
        "physical_cores": machine.physical_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes, "driver": gpu.driver} for gpu in machine.gpus],
        "command": ["picollm", *redact(sys.argv[1:])],
    }


def redact(arguments: list[str]) -> list[str]:
    """A command line with everything that looks like a secret replaced by `***`."""
    shown, hide_next = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next:
            shown.append("***")
            hide_next = False
        elif _SECRET_NAME.search(name):
            shown.append(f"{name}=***" if equals else argument)
            hide_next = not equals and argument.startswith("-")
        else:
            shown.append(_SECRET_VALUE.sub("***", argument))
    return shown


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it was installed from a wheel."""
    import picollm

    root = Path(picollm.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
