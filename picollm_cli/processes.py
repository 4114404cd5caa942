"""Processes that a command starts: their environment, their end, and signals that must not end them half-way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from picollm.errors import WorkerError
from picollm.events import Event, EventFollower

POLL_S = 0.2
MEASURE_LOG = "log.txt"
# Threads of GNU OpenMP spin at the end of every loop until the last one is there: when another program has a core,
# that is a time slice. 60 demo steps on two cores, one of them busy: 64 s with the default of "forever", 9 s with
# this, and no slower on a quiet machine (bench/RESULTS.md).
SPIN_COUNT = {"GOMP_SPINCOUNT": "10000"}


def start(
    command: list[str], *, log: IO[bytes], folder: Path, errors: Path, threads: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a worker, or torchrun with its workers, in a session of its own.

    Ctrl-C in the terminal then reaches the command only: torchrun would kill in the middle of a save.

    Args:
        log: takes its output.
        folder: its working folder, on the disk that the run is on.
        errors: where torchrun writes why it could not go on.
        threads: of each rank, for OpenMP; None leaves that open.
    """
    environment = {
        **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
        "TORCHELASTIC_ERROR_FILE": str(errors),
        # torchrun's own store outlives its workers: after a restart gloo would find addresses of the dead in it.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # The worker's folder holds `datasets/` and `runs/`, which must not shadow modules of these names.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=SPIN_COUNT | os.environ | environment,
        start_new_session=True,
    )


def measure(
    command: list[str], folder: Path, events: Path, show: Callable[[Event], None], *, threads: int | None = None
) -> int:
    """Run a process that measures to its end and hand on what it tells; returns its exit code.

    It has nothing to save, so whatever ends this function kills it, SIGTERM included, which ends it like Ctrl-C.

    Args:
        folder: takes its output, `log.txt`.
        events: the file in which it tells.
        threads: as in `start`.
    """
    follower = EventFollower(events)
    with open(folder / MEASURE_LOG, "wb") as log, catch_signals(_interrupt):
        process = start(command, log=log, folder=folder, errors=folder / "torchrun_error.json", threads=threads)
        try:
            while process.poll() is None:
                for event in follower.poll():
                    show(event)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            if process.poll() is None:
                kill_tree(process)
                process.wait()
            for event in follower.poll():
                show(event)
    return process.returncode


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def measuring_died(what: str, code: int, folder: Path, *, hint: str | None = None) -> WorkerError:
    """The error for a process of `measure` that ended without a word of its own."""
    from picollm_cli.failure import end_of, last_lines

    cause = "\n    ".join([f"{end_of(code)}; its last lines:", *last_lines(folder / MEASURE_LOG)])
    return WorkerError(what, cause=cause, hint=hint)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything under it; torchrun's children have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@contextlib.contextmanager
def catch_signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Send SIGINT and SIGTERM of this process to `on_signal` for the life of the block."""

    def handle(number: int, frame: object) -> None:
        on_signal()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
