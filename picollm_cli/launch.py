"""Start one stage's worker, watch it, stop it, and say how it ended.

The worker gets its stage folder and nothing else. Its output goes to `log/attempt_N.log`; what happens in it is read
from `events.jsonl`; whether it succeeded is read from `STAGE.json`, the exit code only explains a failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from picollm import errors
from picollm.errors import HostError, Interrupted, PicollmError, WorkerError
from picollm.events import EventFollower
from picollm.files import disk_errors, read_json, sha256_json
from picollm.locks import hold_lock
from picollm.run_dir import StageDir
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, launch_command
from picollm_cli.live import StageView

POLL_S = 0.1
# A worker notices within a second that its launcher died, and may then need half a minute to save.
ORPHAN_WAIT_S = 60.0
LOG_LINES = 8
# Threads of GNU OpenMP spin at the end of every loop until the last one is there: when another program has a core,
# that is a time slice. 60 demo steps on two cores, one of them busy: 64 s with the default of "forever", 9 s with
# this, and no slower on a quiet machine (bench/RESULTS.md).
SPIN_COUNT = {"GOMP_SPINCOUNT": "10000"}
AGAIN = "run the same command again to continue"


def run_stage(
    out: Output,
    stage: StageDir,
    module: str,
    *,
    launch: Launch = Launch(),
    title: str | None = None,
) -> dict[str, Any]:
    """Run a prepared stage to its end and return its record; a stage that is done is not started.

    Args:
        stage: its `config.json` is written.
        module: what the worker runs, such as `picollm.stages.pretrain`.
        title: what the progress calls it; the stage's name unless told.

    Raises:
        Interrupted: stopped by Ctrl-C, SIGTERM or `STOP`; the state is saved.
        HostError: another process works on this stage.
        WorkerError: the worker died; names rank, root cause and log.
        PicollmError: what the worker itself raised, as the same class.
    """
    config = stage.read_config()
    inputs = {"recipe": sha256_json(config["recipe"])}
    if (record := stage.record()) and stage.is_done(inputs):
        return record
    _wait_for_lock(out, stage)
    attempt = Attempt(out, stage, _command(stage, module, launch), config["runtime"], title or stage.name)
    attempt.run()
    if (record := stage.record()) and stage.is_done(inputs):
        if attempt.signals:
            # The request came while the last files were written: this stage is whole, the next must not start.
            raise Interrupted(f"{attempt.title} is finished; stopped after it", hint=AGAIN)
        return record
    raise attempt.failure()


def _command(stage: StageDir, module: str, launch: Launch) -> list[str]:
    from picollm.hardware import detect

    return launch_command(stage, module, launch, has_gpu=bool(detect().gpus))


# -- one attempt ------------------------------------------------------------------------------------------------------


class Attempt:
    """One start of a stage's worker, from launcher file to exit code."""

    def __init__(self, out: Output, stage: StageDir, command: list[str], runtime: dict[str, Any], title: str) -> None:
        self.out = out
        self.stage = stage
        self.command = command
        self.runtime = runtime
        self.title = title
        self.exit_code: int | None = None
        self.stopped = False
        self.signals = 0
        self._told = 0
        with disk_errors(stage.log_dir):
            stage.log_dir.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_attempt_number(path) for path in stage.log_dir.glob("attempt_*.log")), default=0)
        self.log_path = stage.log_dir / f"attempt_{number}.log"
        self.error_path = stage.log_dir / "error.json"
        self.torchrun_error_path = stage.log_dir / "torchrun_error.json"

    def run(self) -> None:
        """Start the worker and follow it until it is gone."""
        for stale in (self.stage.stop_path, self.error_path, self.torchrun_error_path):
            stale.unlink(missing_ok=True)
        follower = EventFollower(self.stage.events_path)
        with disk_errors(self.log_path), open(self.log_path, "wb") as log:
            # Signals are ours from before the start, so that none can leave a worker without its parent's STOP.
            with _signals(self._on_signal):
                _write_launcher(self.stage)
                process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.stage.run.base,
                    env=self._environment(),
                    # Ctrl-C in the terminal reaches this process only: torchrun would kill in the middle of a save.
                    start_new_session=True,
                )
                try:
                    with StageView(self.out, self.title) as view:
                        self._follow(process, follower, view)
                finally:
                    if process.poll() is None:
                        self.stage.stop_path.touch()
        self.exit_code = process.returncode
        for spent in (self.stage.stop_path, self.stage.launcher_path):
            spent.unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        return (
            SPIN_COUNT
            | os.environ
            | {
                "OMP_NUM_THREADS": str(self.runtime["threads"]),
                "TORCHELASTIC_ERROR_FILE": str(self.torchrun_error_path),
                # The worker's folder holds `datasets/` and `runs/`, which must not shadow modules of these names.
                "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1",
            }
        )

    def _on_signal(self) -> None:
        """First: ask the worker to save and stop. Later ones: `_follow` kills it."""
        self.signals += 1
        self.stage.stop_path.touch()

    def _follow(self, process: subprocess.Popen[bytes], follower: EventFollower, view: StageView) -> None:
        while process.poll() is None:
            self._show(follower, view)
            self._answer_signals(process, view)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        self._show(follower, view)
        self._answer_signals(process, view)

    def _answer_signals(self, process: subprocess.Popen[bytes], view: StageView) -> None:
        """Tell about a signal outside its handler, and kill after the second."""
        if self.signals == self._told:
            return
        if self._told == 0:
            view.say(f"stopping {self.title}: saving first; Ctrl-C again kills it")
        if self.signals > 1:
            view.say(f"killing {self.title}")
            _kill_tree(process)
        self._told = self.signals

    def _show(self, follower: EventFollower, view: StageView) -> None:
        for event in follower.poll():
            if event["kind"] == "stage_end" and event.get("reason") == "stopped":
                self.stopped = True
            view.show(event)
        view.tick()

    def failure(self) -> PicollmError:
        """Why there is no record, as the error to raise."""
        assert self.exit_code is not None
        asked = self.signals > 0 or self.stopped or self.exit_code == Interrupted.exit_code
        if self.signals > 1 or (asked and not self.error_path.exists()):
            return self._interrupted()
        if self.error_path.exists():
            return self._reported(read_json(self.error_path))
        return self._died(f"exit code {self.exit_code}" if self.exit_code >= 0 else _signal_name(-self.exit_code))

    def _interrupted(self) -> Interrupted:
        step = _saved_step(self.stage)
        if self.signals > 1:
            kept = f"its last checkpoint is that of step {step}" if step else "it has no checkpoint yet"
            return Interrupted(f"{self.title} was killed", cause=kept, hint=AGAIN)
        kept = f", state saved at step {step}" if step else ""
        return Interrupted(f"{self.title} stopped{kept}", hint=AGAIN)

    def _reported(self, report: dict[str, Any]) -> PicollmError:
        """What the worker wrote before it ended: our own errors as they were, others as a WorkerError."""
        found = getattr(errors, str(report["type"]), None)
        # The base class itself stands for an exception that is not ours.
        if isinstance(found, type) and issubclass(found, PicollmError) and found is not PicollmError:
            return found(report["message"], cause=report["cause"], hint=report["hint"] or self._log_hint())
        return self._died(f"rank {report.get('rank', 0)}: {report['message']}")

    def _died(self, cause: str) -> WorkerError:
        if lines := _last_lines(self.log_path):
            cause = "\n    ".join([f"{cause}; its last lines:", *lines])
        return WorkerError(f"the training process of `{self.title}` died", cause=cause, hint=self._log_hint())

    def _log_hint(self) -> str:
        step = _saved_step(self.stage)
        again = f"the same command continues from step {step}" if step else "the same command starts it again"
        return f"its whole output is in `{self.log_path}`; {again}"


def _attempt_number(path: Path) -> int:
    digits = path.stem.removeprefix("attempt_")
    return int(digits) if digits.isdecimal() else 0


def _last_lines(path: Path) -> list[str]:
    """The end of a log, without empty lines."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-LOG_LINES:]


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"killed by {name}" + (", which the system sends when memory runs out" if name == "SIGKILL" else "")


def _saved_step(stage: StageDir) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max(stage.finished_steps(), default=0)


# -- processes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    """Send SIGINT and SIGTERM of this process to `on_signal` for the life of the block."""

    def handle(number: int, frame: object) -> None:
        on_signal()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker and everything under it; torchrun's children have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _write_launcher(stage: StageDir) -> None:
    """Say who waits for the worker: it stops by itself when this process is gone."""
    import psutil

    with disk_errors(stage.launcher_path):
        stage.launcher_path.write_text(f"{os.getpid()} {psutil.Process().create_time()}\n")


def _wait_for_lock(out: Output, stage: StageDir) -> None:
    """Return when no worker holds the stage; wait only for one whose launcher died, which is about to stop.

    Raises:
        HostError: another holder, or the orphan is still there after ORPHAN_WAIT_S.
    """
    from picollm.worker import launcher_lives

    deadline = time.monotonic() + ORPHAN_WAIT_S
    told = False
    while True:
        try:
            with hold_lock(stage.lock_path, f"stage `{stage.name}` of run `{stage.run.name}`"):
                return
        except HostError:
            if launcher_lives(stage) or time.monotonic() > deadline:
                raise
        if not told:
            told = True
            out.note(f"an earlier worker of `{stage.name}` lost its parent and is saving; waiting for it to end")
        time.sleep(0.5)
