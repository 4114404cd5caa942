"""Facts about the place and the command that make a run, for its record."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from picollm.errors import printable
from picollm.files import SCHEMA, sha256_file, sha256_json
from picollm.run_dir import RunDir

_SECRET_NAME = re.compile(r"(?i)(^|[-_.])(token|secret|password|passwd|api[-_]?key|credentials?)$")
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")


def environment() -> dict[str, Any]:
    """What goes into `environment.json` of a new run: when, by what, where, and the command line without secrets."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"schema": SCHEMA, "created": created, **_place(), "command": _command()}


def record_command(run: RunDir, stage: str) -> None:
    """Note in the run's events who is about to make a stage: another day it may be other code, on another machine.

    Only the holder of the run's lock does.
    """
    from picollm.events import EventWriter

    events = EventWriter(run.events_path, stage)
    events.write("command", command=_command(), **_place())
    events.close()


def _command() -> list[str]:
    return ["picollm", *map(printable, redact(sys.argv[1:]))]


@functools.cache
def _place() -> dict[str, Any]:
    """The code, down to its bytes, the packages that it needs, and the machine."""
    from picollm import __version__
    from picollm.hardware import detect

    machine = detect()
    packages = _packages()
    commit, dirty = _git_state()
    return {
        "picollm": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "code_sha256": _code_sha256(),
        "python": platform.python_version(),
        "torch": packages.pop("torch", None),
        "packages": packages,
        "system": platform.platform(),
        "cpu": machine.cpu_name,
        "physical_cores": machine.physical_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes, "driver": gpu.driver} for gpu in machine.gpus],
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


def _packages() -> dict[str, str]:
    """Version of each package that ours declares and that is there, by name."""
    from importlib import metadata

    from packaging.requirements import Requirement

    from picollm_cli.machine_checks import DISTRIBUTION

    found = {}
    try:
        declared = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        declared = [Requirement("torch")]  # run from a folder that was never installed
    for need in declared:
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            try:
                found[need.name] = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                continue
    return dict(sorted(found.items()))


def _code_sha256() -> str:
    """Hash of every Python file of both packages: the same for a checkout, a wheel, and one that was edited back."""
    root = _root()
    files = sorted(path for name in ("picollm", "picollm_cli") for path in (root / name).rglob("*.py"))
    return sha256_json({path.relative_to(root).as_posix(): sha256_file(path) for path in files})


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that the code runs from, and whether its code differs from it; None in a wheel."""
    if not (_root() / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "picollm", "picollm_cli")
    return commit or None, None if changed is None else bool(changed)


def _git(*words: str) -> str | None:
    """What git says about the checkout; None when it says nothing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(_root()), *words],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _root() -> Path:
    """The folder that holds both packages."""
    import picollm

    return Path(picollm.__file__).resolve().parents[1]
