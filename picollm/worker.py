"""The process around a stage: one argument, a lock, events, a stop that saves, errors that the parent can read."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from picollm.errors import (
    ConfigError,
    Diverged,
    HostError,
    IntegrityError,
    Interrupted,
    MissingArtifact,
    OutOfMemory,
    PicollmError,
    first_line,
)
from picollm.events import EventWriter, attempts
from picollm.locks import hold_lock
from picollm.run_dir import StageDir

LOOK_EVERY_S = 1.0
# A rank without a parent whose peers do not answer cannot agree with them to stop; the next command waits 60 s for it.
ORPHAN_EXIT_S = 45.0
# What starting again cannot cure.
DETERMINISTIC = (ConfigError, Diverged, HostError, IntegrityError, MissingArtifact)


class Worker:
    """What a stage's `main` is given.

    Attributes:
        stage: its folder.
        config: `{"schema", "stage", "recipe", "runtime"}`.
        rank, world: this process among those of the stage.
    """

    def __init__(self, stage: StageDir, config: dict[str, Any], rank: int, world: int) -> None:
        self.stage, self.config, self.rank, self.world = stage, config, rank, world
        self.events = EventWriter(stage.events_path, stage.name) if rank == 0 else None
        self.device: Any = None  # torch.device, set once the process group stands
        self._parent = os.getppid()
        self._stop = False
        self._looked = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop = True

    def should_stop(self) -> bool:
        """True when somebody asked for it, or when whoever started us is gone. Looks at most once a second.

        Every rank has a parent of its own to look at, on its own machine; the files are rank 0's to look at.
        """
        if not self._stop and (now := time.monotonic()) - self._looked >= LOOK_EVERY_S:
            self._looked = now
            here = self.rank == 0 and (self.stage.stop_path.exists() or not launcher_lives(self.stage))
            if here or self._is_orphan():  # never set to False: a signal may come while we look
                self._stop = True
        return self._stop

    def _is_orphan(self) -> bool:
        return os.getppid() != self._parent

    def leave_when_orphaned(self) -> None:
        """Exit without saving when this rank waits in vain for peers after its parent died; watched by a thread.

        One process alone needs none: it stops by itself.
        """

        def watch() -> None:
            while not self._is_orphan():
                time.sleep(LOOK_EVERY_S)
            time.sleep(ORPHAN_EXIT_S)
            os._exit(Interrupted.exit_code)

        if self.world > 1:
            threading.Thread(target=watch, name="orphan", daemon=True).start()

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event; only rank 0 does."""
        if self.events is not None:
            self.events.write(kind, **fields)

    def note(self, text: str, *, level: str = "info") -> None:
        self.event("note", text=text, level=level)

    def start(self, *, resumed_from: int = 0, total_steps: int | None = None) -> None:
        """The stage's first event, once it is known where it goes on."""
        if self.rank == 0:
            attempt = attempts(self.stage.events_path) + 1
            self.event("stage_start", attempt=attempt, resumed_from=resumed_from, total_steps=total_steps)


def start_of(pid: int) -> float:
    """When a process began, in seconds that stay the same when somebody sets the clock.

    On Linux the system counts from boot, and psutil adds the time of boot: as the clock of now has it, or in older
    versions as it was when `boot_time` was called last. So that is called first.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    import psutil

    boot = psutil.boot_time() if psutil.LINUX else 0.0
    return psutil.Process(pid).create_time() - boot


def launcher_lives(stage: StageDir) -> bool:
    """False when the command that started the stage is gone; True when it lives or when there was none."""
    import psutil

    try:
        pid, started, *host = stage.launcher_path.read_text().split()
        if host and host != [socket.gethostname()]:
            return True  # on another machine, where torchrun put rank 0's node second; our own parent tells enough
        return abs(start_of(int(pid)) - float(started)) < 1.0
    except FileNotFoundError:
        return True
    except ValueError:
        return True  # being written
    except psutil.NoSuchProcess:
        return False


def run(main: Callable[[Worker], None]) -> NoReturn:
    """Run a stage's `main` on the folder named by the one argument, and exit the process.

    Exit codes are those of picollm.errors; 130 after a stop. The exit is hard: interpreter shutdown after a process
    group has been seen to abort although all results were right.
    """
    code = 1
    stage: StageDir | None = None
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if len(sys.argv) != 2:
            raise ConfigError(
                "a worker takes one argument, its stage folder",
                hint="`picollm pretrain --help` starts workers with everything they need",
            )
        stage = StageDir(Path(sys.argv[1]).absolute())
        given_up = _given_up(stage)
        code = _run_stage(stage, main, rank, world) if given_up is None else given_up
    except BaseException as error:
        code = _report(stage, error, rank)
    if code == Interrupted.exit_code and "TORCHELASTIC_RUN_ID" in os.environ:
        code = 0  # torchrun would start again what was asked to stop; the parent reads the events
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _given_up(stage: StageDir) -> int | None:
    """Exit code when torchrun starts us again and should not: after a stop, or an error that comes back every time."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    if stage.stop_path.exists() or not launcher_lives(stage):
        return Interrupted.exit_code
    try:
        report = json.loads((stage.log_dir / "error.json").read_bytes())
        return next((kind.exit_code for kind in DETERMINISTIC if kind.__name__ == report["type"]), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run_stage(stage: StageDir, main: Callable[[Worker], None], rank: int, world: int) -> int:
    config = stage.read_config()
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(hold_lock(stage.lock_path, f"stage `{stage.name}` of run `{stage.run.name}`", wait_s=2))
            stale = [stage.tokens_path, stage.log_dir / "error.json"]
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                stale.append(stage.stop_path)  # after a restart it is of now, not of a run before this one
            for path in stale:
                path.unlink(missing_ok=True)
            stage.pid_path.write_text("")
            stack.callback(stage.pid_path.unlink, missing_ok=True)
        worker = Worker(stage, config, rank, world)
        worker.leave_when_orphaned()
        keep_freed_memory()
        _limit_threads(int(config["runtime"]["threads"]))
        from picollm.train import distributed

        try:
            worker.device = distributed.start()
            with open(stage.pid_path, "a") as file:
                file.write(f"{os.getpid()}\n")
            main(worker)
        except Interrupted as error:
            worker.event("stage_end", ok=False, reason="stopped", text=error.message)
            raise
        except BaseException as error:
            worker.event("stage_end", ok=False, reason=type(error).__name__)
            raise
        worker.event("stage_end", ok=True)
        distributed.stop()
    return 0


def keep_freed_memory() -> None:
    """Let glibc keep large buffers instead of returning them to the kernel after every operation.

    A training step allocates and frees the same megabytes again and again; without this up to a sixth of its time
    goes into page faults (bench/choices.py). Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the largest value glibc takes
        mallopt(trim_threshold, 2**31 - 1)


def _limit_threads(threads: int) -> None:
    """As many threads as the runtime says, for torch and for the tokenizer."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")
    import torch

    torch.set_num_threads(threads)


def _report(stage: StageDir | None, error: BaseException, rank: int) -> int:
    """Tell the log and the parent what went wrong; returns the exit code."""
    if isinstance(error, Interrupted):
        return error.exit_code
    trace = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # no room for the log either
        print(trace, file=sys.stderr, flush=True)
    known = as_known(error)
    if stage is not None and stage.path.is_dir():
        with contextlib.suppress(OSError):  # the first rank to fail tells; a full disk must not hide the error
            stage.log_dir.mkdir(parents=True, exist_ok=True)
            with open(stage.log_dir / "error.json", "x") as file:
                json.dump({**known.to_dict(), "rank": rank, "traceback": trace}, file)
    return known.exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the host, ran out: each library has its own way to say so."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)


# CPU allocator on Linux and elsewhere, C++, oneDNN; cuBLAS, cuDNN; the CUDA driver; its runtime, as torch, Triton and
# NCCL quote it.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "out of memory",
)


def as_known(error: BaseException) -> PicollmError:
    """An exception as an error of our tree: out of memory is known by its types and words."""
    if isinstance(error, PicollmError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(
            "out of memory",
            cause=first_line(error),
            hint="lower `--set train.device_batch_size=…`; the batch in tokens stays the same",
        )
    if type(error).__name__ == "DistBackendError" or "by peer" in str(error):  # closed, or reset
        reason = str(error).partition("Last error:")[2].strip().partition("\n")[0]  # NCCL's, behind torch's own lines
        if reason and "peer" not in reason and "remote" not in reason:
            return PicollmError(f"NCCL failed: {reason}", cause=first_line(error))
        # Not the culprit, who was killed without a word or is about to report.
        return PicollmError("another process of the stage is gone", cause=reason or first_line(error))
    return PicollmError(f"{type(error).__name__}: {error}")
