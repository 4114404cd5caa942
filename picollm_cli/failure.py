"""Why a stage's processes ended without a record, from what they left behind.

In this order: what the first failing rank wrote (`log/error.json`), what torchrun saw of a rank that could not write
any more, why torchrun itself gave up, and the last lines of the log.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from picollm import errors
from picollm.errors import HostError, IntegrityError, OutOfMemory, PicollmError, WorkerError
from picollm.files import read_json
from picollm.run_dir import StageDir

LOG_LINES = 8
# What Python, the dynamic loader and the C library say when a process cannot even load its libraries.
_NO_MEMORY = re.compile(r"^MemoryError|failed to map segment from shared object|Cannot allocate memory")
_SUMMARY = re.compile(r"^torch\.distributed\.elastic\.multiprocessing\.errors\.ChildFailedError", re.MULTILINE)
_TORCHRUN = "torch/distributed/run.py"
# The end of torchrun's summary; the failure that it saw first is the one that took the others along.
_ROOT_CAUSE = re.compile(r"Root Cause.*?^\s*rank\s*: (\d+).*?^\s*exitcode\s*: (-?\d+)", re.DOTALL | re.MULTILINE)


def explain(stage: StageDir, title: str, *, exit_code: int, log: Path, torchrun_errors: Path) -> PicollmError:
    """The error to raise for a stage that failed.

    Args:
        title: what people call the stage.
        exit_code: of the worker or of torchrun, negative for a signal.
        log: their output.
        torchrun_errors: what `TORCHELASTIC_ERROR_FILE` named.
    """
    hint = f"its whole output is in `{log}`; {_again(stage)}"
    report = read_report(stage)
    if report and (error := from_report(report, hint=hint)):
        return error
    if dead := _rank_killed(log):
        cause = "rank {}: {}".format(*dead)
    elif report:
        cause = f"rank {report.get('rank', 0)}: {report['message']}"
    elif trouble := _torchrun_trouble(torchrun_errors):
        if trouble.startswith("Rendezvous"):
            return HostError(
                f"the nodes of `{title}` did not find each other",
                cause=trouble,
                hint="start the same command on every node, each with its `node_rank`; node 0's port must be open; "
                f"torchrun's output is in `{log}`",
            )
        cause = f"torchrun: {trouble}"
    else:
        cause = end_of(exit_code)
    lines = last_lines(log)
    if lines and _NO_MEMORY.search(lines[-1]):
        # Not even torch could be loaded, so the worker could not say it in its own words.
        return OutOfMemory(
            f"there is too little memory to start `{title}`",
            cause=lines[-1],
            hint=f"end other programs, or raise the limit (`ulimit -v`, the container's); {hint}",
        )
    if lines:
        cause = "\n    ".join([f"{cause}; its last lines:", *lines])
    return WorkerError(f"the training process of `{title}` died", cause=cause, hint=hint)


def read_report(stage: StageDir) -> dict[str, Any] | None:
    """What the first failing rank said: an error's fields, `rank` and `traceback`; None when no rank could.

    A rank that found the disk full, or was killed over it, leaves a torn one.
    """
    try:
        found = read_json(stage.log_dir / "error.json")
    except (FileNotFoundError, IntegrityError):
        return None
    return found if isinstance(found, dict) and {"type", "message", "cause", "hint"} <= found.keys() else None


def from_report(report: dict[str, Any], *, hint: str | None = None) -> PicollmError | None:
    """An error of ours as it was raised, from its fields; None for an exception that is not ours.

    Args:
        hint: what to say when the error has none.
    """
    found = getattr(errors, str(report["type"]), None)
    # The base class itself stands for an exception that is not ours.
    if isinstance(found, type) and issubclass(found, PicollmError) and found is not PicollmError:
        return found(report["message"], cause=report["cause"], hint=report["hint"] or hint)
    return None


def saved_step(stage: StageDir) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max(stage.finished_steps(), default=0)


def last_lines(path: Path) -> list[str]:
    """The end of what the ranks said: a log without empty lines and without torchrun's own traceback and summary."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    if summary := _SUMMARY.search(text):
        text = text[: summary.start()]
        before, traceback, after = text.rpartition("Traceback (most recent call last):")
        text = before if traceback and _TORCHRUN in after else text
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]


def _again(stage: StageDir) -> str:
    step = saved_step(stage)
    return f"the same command continues from step {step}" if step else "the same command starts it again"


def end_of(exit_code: int) -> str:
    """An exit code in words; negative for a signal."""
    return f"exit code {exit_code}" if exit_code >= 0 else _signal_text(-exit_code)


# What a signal that killed a worker means, where that says what to look at.
_WHEN = {
    "SIGKILL": ", which the system sends when memory runs out",
    "SIGBUS": ", which the system sends when a mapped file (tokens, weights) is cut or its disk fails",
}


def _signal_text(number: int) -> str:
    name = signal.Signals(number).name
    return f"killed by {name}" + _WHEN.get(name, "")


def _rank_killed(log: Path) -> tuple[str, str] | None:
    """The rank that a signal killed before any other failed, and the signal; as torchrun's summary in the log says."""
    try:
        found = list(_ROOT_CAUSE.finditer(log.read_text(errors="replace")))
    except FileNotFoundError:
        return None
    if not found or int(found[-1][2]) >= 0:
        return None
    return found[-1][1], _signal_text(-int(found[-1][2]))


def _torchrun_trouble(path: Path) -> str | None:
    """The exception that ended torchrun itself, such as `RendezvousTimeoutError: …`; None when there was none."""
    if not path.is_file():
        return None
    found = read_json(path).get("message")
    text = found.get("message") if isinstance(found, dict) else found
    return " ".join(str(text).split()).rstrip(": ") if text else None
