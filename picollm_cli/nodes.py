"""Several machines, one run folder: node 0's command leads, the commands on other nodes follow.

The leader prepares stages, holds the locks, draws, and says in `RUN/nodes` which attempt its torchrun waits for. A
follower starts its own torchrun for that attempt and writes nothing but its log. Whether the leader lives is seen by a
count that it raises every few seconds: process ids mean nothing on another machine, and clocks differ.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from picollm.errors import HostError, Interrupted, PicollmError, WorkerError, first_line
from picollm.files import disk_errors, sha256_file, sha256_json
from picollm.run_dir import RunDir, StageDir
from picollm_cli.failure import from_report
from picollm_cli.launch_line import Launch, launch_command
from picollm_cli.processes import catch_signals, kill_tree, start

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType

    from picollm_cli.console import Output

BEAT_S = 2.0
# A shared disk may show a change half a minute late.
LOST_S = 90.0
# For a sign of a leader that was never seen alive.
START_WAIT_S = 600.0
# An agent whose attempt is over ends by itself; one that saves because the leader died may need longer.
LEAVE_S = 60.0
POLL_S = 0.2
SAY_EVERY_S = 60.0
RETRY_S = 5.0
AGAIN = "run the same command again on every node to continue"


# -- the leader -------------------------------------------------------------------------------------------------------


class Board:
    """What node 0's command tells the other nodes, for the life of a block; how the block ended is told too."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.nodes_path
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._said: dict[str, Any] = {"command": time.time_ns(), "beat": 0, "stage": None, "attempt": None}

    def __enter__(self) -> Board:
        with disk_errors(self._path):
            self._write()
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._beats.join()
        self._tell(stage=None, attempt=None, ended={"error": _fields(error)})

    @contextlib.contextmanager
    def attempt(self, stage: StageDir, name: str) -> Iterator[None]:
        """Call the other nodes to an attempt for the life of the block."""
        self._tell(stage=stage.name, attempt=name, config=sha256_file(stage.config_path))
        try:
            yield
        finally:
            self._tell(stage=None, attempt=None)

    def _tell(self, **fields: Any) -> None:
        self._said |= fields
        with contextlib.suppress(OSError):  # a full disk: the stage will say so
            self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._tell(beat=self._said["beat"] + 1)

    def _write(self) -> None:
        # Written in place: other machines see new bytes of an open file before they see that a name was replaced.
        with self._lock:
            self._path.write_text(json.dumps(self._said))


def _fields(error: BaseException | None) -> dict[str, object] | None:
    """How a block ended, as an error's fields; None when it went well."""
    if error is None or isinstance(error, PicollmError):
        return error and error.to_dict()
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted").to_dict()
    return WorkerError(f"{type(error).__name__}: {first_line(error)}").to_dict()


def leading(run: RunDir, launch: Launch) -> contextlib.AbstractContextManager[Board | None]:
    """The board of a command that leads several nodes; None where there is one."""
    return Board(run) if launch.nnodes > 1 else contextlib.nullcontext()


# -- a follower -------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What the board says: `attempt` of `stage` is waiting for nodes, or the command has `ended`."""

    stage: str | None
    attempt: str | None
    config: str | None
    ended: dict[str, Any] | None


class BoardReader:
    """Reads the board; believes it only once it has changed, because it may be that of a command long gone."""

    def __init__(self, run: RunDir) -> None:
        self._path = run.nodes_path
        self._last = self._read()
        self._changed: float | None = None

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return None  # not there yet, or being written

    def look(self) -> Call | None:
        """What a living leader says, or said last; None before one was seen."""
        if (found := self._read()) is not None and found != self._last:
            self._last, self._changed = found, time.monotonic()
        if self._changed is None or self._last is None:
            return None
        return Call(*(self._last.get(field) for field in Call._fields))

    @property
    def lost(self) -> bool:
        """The leader was there and has been silent for LOST_S."""
        return self._changed is not None and time.monotonic() - self._changed > LOST_S


def follow(out: Output, run: RunDir, stages: Collection[str], launch: Launch, *, redo: Collection[str] = ()) -> None:
    """Work for node 0 until its command ends; the end of every command with `node_rank` from 1.

    Args:
        stages: training stages that the command runs.
        redo: those that start over, whose records mean nothing.

    Raises:
        PicollmError: what node 0's command ended with, as the same class.
        Interrupted: asked to stop, here or there.
        HostError: node 0 gave no sign for START_WAIT_S.
        WorkerError: node 0's command was there and is gone.
    """
    follower = Follower(out, run, launch)
    with catch_signals(follower.on_signal):
        follower.work([run.stage(name) for name in stages], trust=not redo)
    out.print(f"node {launch.node_rank} is done: run `{run.name}`, {', '.join(stages)}")
    out.result({"run": run.name, "node_rank": launch.node_rank, "stages": list(stages)})


class Follower:
    """One node's command beside node 0's."""

    def __init__(self, out: Output, run: RunDir, launch: Launch) -> None:
        self.out = out
        self.run = run
        self.launch = launch
        self.board = BoardReader(run)
        self.signals = 0
        self._waited_for = ""
        self._said = 0.0

    def on_signal(self) -> None:
        self.signals += 1

    def work(self, stages: list[StageDir], *, trust: bool) -> None:
        """Answer node 0's calls until its command has ended; as in `follow`."""
        started = time.monotonic()
        answered = ""
        while not self.signals:
            call = self.board.look()
            if call is None:
                if trust and stages and all(_is_done(stage) for stage in stages):
                    return
                if time.monotonic() - started > START_WAIT_S:
                    self._no_leader()
                self._say_waiting("node 0 to start this command with `node_rank=0`")
            elif call.ended:
                self._ended(call.ended)
                return
            elif self.board.lost:
                raise WorkerError(
                    "node 0's command is gone",
                    cause=f"`{self.run.nodes_path}` has not changed for {LOST_S:.0f} s",
                    hint=f"its own output or its machine says why; {AGAIN}",
                )
            elif call.stage and call.attempt and call.attempt != answered and self._sees(call):
                self._answer(call)
                answered = call.attempt
            else:
                self._say_waiting(f"node 0 to prepare the next stage of run `{self.run.name}`")
            time.sleep(POLL_S)
        raise Interrupted(f"node {self.launch.node_rank} was stopped", hint=AGAIN)

    def _say_waiting(self, what: str) -> None:
        """One line when a wait begins, then one a minute."""
        now = time.monotonic()
        if what != self._waited_for or now - self._said >= SAY_EVERY_S:
            self._waited_for, self._said = what, now
            self.out.note(f"node {self.launch.node_rank}: waiting for {what}")

    def _no_leader(self) -> NoReturn:
        raise HostError(
            "node 0 does not start",
            cause=f"`{self.run.nodes_path}` did not change for {START_WAIT_S:.0f} s",
            hint="start the same command there with `node_rank=0`; the base directory must be one shared disk",
        )

    def _ended(self, how: dict[str, Any]) -> None:
        """Raises what node 0's command ended with, if that was an error."""
        if (report := how["error"]) is None:
            return
        if error := from_report(report):
            raise error
        raise WorkerError(f"node 0 failed: {report['message']}", cause=report["cause"], hint=report["hint"])

    def _sees(self, call: Call) -> bool:
        """Whether this machine's view of the shared disk has the config that the workers must read."""
        try:
            return sha256_file(self._stage(call).config_path) == call.config
        except OSError:
            return False

    def _stage(self, call: Call) -> StageDir:
        return self.run.stage(str(call.stage))

    # -- one attempt --

    def _answer(self, call: Call) -> None:
        """Start this node's torchrun for an attempt and see it to its end; again where it alone failed."""
        for _ in range(self.launch.max_restarts + 1):
            self.out.note(f"node {self.launch.node_rank}: joining `{call.stage}`, attempt `{call.attempt}`")
            code = self._run_agent(call)
            deadline = time.monotonic() + RETRY_S
            # When the attempt has failed as a whole, node 0 takes its call back.
            while code and self._is_on(call) and not self.signals and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if not code or not self._is_on(call) or self.signals:
                return
            self.out.warn(f"node {self.launch.node_rank}: torchrun ended with exit code {code}; its output is in "
                          f"`{self._log(call)}`")  # fmt: skip

    def _is_on(self, call: Call) -> bool:
        now = self.board.look()
        return now is not None and now.attempt == call.attempt and not now.ended and not self.board.lost

    def _log(self, call: Call) -> Path:
        number = str(call.attempt).rpartition("-")[2]
        return self._stage(call).log_dir / f"attempt_{number}_node_{self.launch.node_rank}.log"

    def _run_agent(self, call: Call) -> int:
        """Run torchrun until it ends, or LEAVE_S after the attempt did; returns its exit code."""
        from picollm.hardware import detect

        stage, log = self._stage(call), self._log(call)
        module = f"picollm.stages.{stage.name}"
        command = launch_command(stage, module, self.launch, has_gpu=bool(detect().gpus), attempt=call.attempt)
        with disk_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            output = open(log, "ab")
        with output:
            threads = stage.read_config()["runtime"]["threads"]
            process = start(command, log=output, folder=self.run.base, threads=threads, errors=log.with_suffix(".json"))
            try:
                self._attend(call, process)
            finally:
                if process.poll() is None:
                    kill_tree(process)
        return process.wait()

    def _attend(self, call: Call, process: subprocess.Popen[bytes]) -> None:
        """Return when torchrun has ended, or should have, or was told to twice."""
        answered_signals, over_since = 0, None
        while process.poll() is None:
            if self.signals > answered_signals:
                answered_signals = self.signals
                if self.signals > 1:
                    self.out.note(f"killing `{call.stage}` on node {self.launch.node_rank}")
                    return
                # All nodes stop: what one rank sees in the run's folder, the ranks agree on.
                self._stage(call).stop_path.touch()
                self.out.note(f"stopping `{call.stage}` on all nodes: saving first; Ctrl-C again kills it on this one")
            if not self._is_on(call):
                over_since = over_since or time.monotonic()
                if time.monotonic() - over_since > LEAVE_S:
                    return
            time.sleep(POLL_S)


def _is_done(stage: StageDir) -> bool:
    if not stage.config_path.is_file():
        return False
    return stage.is_done({"recipe": sha256_json(stage.read_config()["recipe"])})
