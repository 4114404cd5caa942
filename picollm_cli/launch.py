"""Start one stage's worker, watch it, stop it, and say how it ended.

The worker gets its stage folder and nothing else. Its output goes to `log/attempt_N.log`; what happens in it is read
from `events.jsonl`; whether it succeeded is read from `STAGE.json`, the exit code only explains a failure.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from picollm.errors import HostError, Interrupted, PicollmError
from picollm.events import EventFollower
from picollm.files import disk_errors, sha256_json
from picollm.locks import hold_lock
from picollm.run_dir import StageDir
from picollm_cli.console import Output
from picollm_cli.environment import record_command
from picollm_cli.failure import explain, read_report, saved_step
from picollm_cli.launch_line import Launch, attempt_id, launch_command
from picollm_cli.live import StageView
from picollm_cli.prepare import note
from picollm_cli.processes import catch_signals, kill_tree, start

if TYPE_CHECKING:
    from picollm_cli.nodes import Board

POLL_S = 0.1
# A worker notices within a second that its launcher died, and may then need half a minute to save.
ORPHAN_WAIT_S = 60.0
LOOK_FOR_ROOM_S = 5.0
FULL_DISK_BYTES = 2**20
AGAIN = "run the same command again to continue"


def run_stage(
    out: Output,
    stage: StageDir,
    module: str,
    *,
    launch: Launch = Launch(),
    board: Board | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Run a prepared stage to its end and return its record; a stage that is done is not started.

    A worker that ran out of memory in its first steps has written a smaller device batch into the stage; it is
    started again with it, as often as that goes on shrinking.

    Args:
        stage: its `config.json` is written.
        module: what the worker runs, such as `picollm.stages.pretrain`.
        board: calls the other nodes, where `launch` has several.
        title: what the progress calls it; the stage's name unless told.

    Raises:
        Interrupted: stopped by Ctrl-C, SIGTERM or `STOP`; the state is saved.
        HostError: another process works on this stage, or the nodes did not find each other.
        WorkerError: the worker died; names rank, root cause and log.
        PicollmError: what the worker itself raised, as the same class.
    """
    title = title or stage.name
    inputs = {"recipe": sha256_json(stage.read_config()["recipe"])}
    if (record := stage.record()) and stage.is_done(inputs):
        return record
    _wait_for_lock(out, stage)
    record_command(stage.run, stage.name)
    while True:
        rows = _device_batch(stage)
        attempt = Attempt(out, stage, module, launch, board, title)
        attempt.run()
        if (record := stage.record()) and stage.is_done(inputs):
            if attempt.signals:
                # The request came while the last files were written: this stage is whole, the next must not start.
                raise Interrupted(f"{title} is finished; stopped after it", hint=AGAIN)
            return record
        if not attempt.backed_off or not _device_batch(stage) < rows:
            raise attempt.failure()
        text = f"out of memory with {rows} rows at a time; started again with {_device_batch(stage)}"
        out.warn(f"{title}: {text}")
        note(stage.run, stage.name, text)


def _device_batch(stage: StageDir) -> int:
    """Rows that a rank takes at a time; 0 for a stage that trains nothing."""
    return stage.read_config()["runtime"].get("device_batch_size", 0)


# -- one attempt ------------------------------------------------------------------------------------------------------


class Attempt:
    """One start of a stage's worker, from launcher file to exit code."""

    def __init__(
        self, out: Output, stage: StageDir, module: str, launch: Launch, board: Board | None, title: str
    ) -> None:
        from picollm.estimate import price_per_hour
        from picollm.hardware import detect

        self.out = out
        self.stage = stage
        self.launch = launch
        self.board = board
        self.title = title
        self.exit_code: int | None = None
        self.stopped = False
        self.signals = 0
        self._phase = ""
        self._looked, self._full = 0.0, False
        self._told = 0
        self._asked_at = 0.0
        self.name = attempt_id(stage)
        machine = detect()
        self.command = launch_command(stage, module, launch, has_gpu=bool(machine.gpus), attempt=self.name)
        self.usd_per_hour = price_per_hour(machine, launch.ranks)
        self.log_path = stage.log_dir / f"attempt_{self.name.rpartition('-')[2]}.log"
        self.error_path = stage.log_dir / "error.json"
        self.torchrun_error_path = stage.log_dir / "torchrun_error.json"

    def run(self) -> None:
        """Start the worker and follow it until it is gone."""
        stage = self.stage
        for stale in (stage.stop_path, stage.pid_path, self.error_path, self.torchrun_error_path):
            stale.unlink(missing_ok=True)
        follower = EventFollower(stage.events_path)
        with disk_errors(self.log_path):
            stage.log_dir.mkdir(parents=True, exist_ok=True)
            log = open(self.log_path, "wb")
        # Signals are ours from before the start, so that none can leave a worker without its parent's STOP.
        with log, self._called(), catch_signals(self._on_signal):
            _write_launcher(stage)
            threads = stage.read_config()["runtime"]["threads"]
            process = start(
                self.command, log=log, folder=stage.run.base, threads=threads, errors=self.torchrun_error_path
            )
            try:
                view = StageView(self.out, self.title, waiting=self._first_wait(), usd_per_hour=self.usd_per_hour)
                with view:
                    self._follow(process, follower, view)
            finally:
                if process.poll() is None:
                    stage.stop_path.touch()
        self.exit_code = process.returncode
        for spent in (stage.stop_path, stage.launcher_path):
            spent.unlink(missing_ok=True)

    def _called(self) -> contextlib.AbstractContextManager[None]:
        return self.board.attempt(self.stage, self.name) if self.board else contextlib.nullcontext()

    def _first_wait(self) -> str:
        """What is waited for before the worker's first word."""
        if (others := self.launch.nnodes - 1) == 0:
            return "starting"
        return f"waiting for {others} other node{'s' * (others > 1)} at {self.launch.rdzv}"

    def _on_signal(self) -> None:
        """First: ask the worker to save and stop. Later ones: `_follow` kills it."""
        self._asked_at = self._asked_at or time.time()
        self.signals += 1

    def _follow(self, process: subprocess.Popen[bytes], follower: EventFollower, view: StageView) -> None:
        while process.poll() is None:
            self._show(follower, view)
            self._answer_signals(process, view)
            self._look_for_room()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        self._show(follower, view)
        self._answer_signals(process, view)

    def _answer_signals(self, process: subprocess.Popen[bytes], view: StageView) -> None:
        """Ask for a stop after the first signal and kill after the second, outside the handler."""
        if self.signals and not self.stage.stop_path.exists():
            self.stage.stop_path.touch()  # again, where a worker that was just starting took it for an old one
        if self.signals == self._told:
            return
        if self.signals > 1:
            view.say(f"killing {self.title}")
            kill_tree(process)
        elif self.launch.nnodes > 1 and not self.stage.pid_path.exists():
            view.say(f"stopping {self.title}: no node has begun, so there is nothing to save")
            kill_tree(process)
        elif self._phase.startswith("compiling") and self.launch.nnodes == 1:
            # The first step of an attempt, and it may take minutes in which no worker can answer.
            view.say(f"stopping {self.title}: no step since the last checkpoint, so there is nothing to save")
            kill_tree(process)
        else:
            view.say(f"stopping {self.title}: saving first; Ctrl-C again kills it")
        self._told = self.signals

    def _look_for_room(self) -> None:
        """Warn, once each time, when the disk is full: a worker goes on, and its own warning finds no room either."""
        from picollm.hardware import disk_free

        if (now := time.monotonic()) - self._looked < LOOK_FOR_ROOM_S:
            return
        self._looked = now
        full = disk_free(self.stage.path) < FULL_DISK_BYTES
        if full and not self._full:
            self.out.warn(
                f"the disk of `{self.stage.run.base}` is full: {self.title} goes on but can save nothing; free room"
            )
        self._full = full

    def _show(self, follower: EventFollower, view: StageView) -> None:
        for event in follower.poll():
            if event["kind"] == "stage_start":
                self.stopped = False  # torchrun stops ranks that it starts again
            elif event["kind"] == "phase":
                self._phase = str(event.get("text") or "")
            elif event["kind"] == "stage_end" and event.get("reason") == "stopped":
                self.stopped = True
            view.show(event)
        view.tick()

    @property
    def backed_off(self) -> bool:
        """Whether the worker ran out of memory and has made its device batch smaller."""
        report = read_report(self.stage)
        return not self.signals and bool(report and report.get("backed_off"))

    def failure(self) -> PicollmError:
        """Why there is no record, as the error to raise."""
        assert self.exit_code is not None
        asked = self.signals > 0 or self.stopped or self.exit_code == Interrupted.exit_code
        if self.signals > 1 or (asked and not self._failed_since_asked()):
            return self._interrupted()
        return explain(
            self.stage,
            self.title,
            exit_code=self.exit_code,
            log=self.log_path,
            torchrun_errors=self.torchrun_error_path,
        )

    def _failed_since_asked(self) -> bool:
        """Whether a rank told of an error; one from before the stop is of ranks that torchrun has started again."""
        return self.error_path.exists() and self.error_path.stat().st_mtime >= self._asked_at

    def _interrupted(self) -> Interrupted:
        step = saved_step(self.stage)
        if self.signals > 1:
            kept = f"its last checkpoint is that of step {step}" if step else "nothing of it is saved yet"
            return Interrupted(f"{self.title} was killed", cause=kept, hint=AGAIN)
        kept = f", state saved at step {step}" if step else ""
        return Interrupted(f"{self.title} stopped{kept}", hint=AGAIN)


# -- who works on a stage ---------------------------------------------------------------------------------------------


def _write_launcher(stage: StageDir) -> None:
    """Say who waits for the worker: it stops by itself when this process is gone."""
    from picollm.worker import start_of

    with disk_errors(stage.launcher_path):
        stage.launcher_path.write_text(f"{os.getpid()} {start_of(os.getpid())} {socket.gethostname()}\n")


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
