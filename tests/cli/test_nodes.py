"""What the commands on several nodes tell each other, with a process that does nothing in torchrun's place."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from picollm.errors import ConfigError, HostError, Interrupted, WorkerError
from picollm.files import sha256_json, write_atomic, write_json
from picollm.run_dir import RunDir, StageDir
from picollm_cli import nodes
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, parse_launch
from picollm_cli.nodes import Board, follow

SECOND = parse_launch("nnodes=2,node_rank=1,rdzv=127.0.0.1:29500")
TORCHRUN = "print('agent'); import sys; sys.exit({code})"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT_S": 0.05, "POLL_S": 0.02, "RETRY_S": 0.2}.items():
        monkeypatch.setattr(nodes, name, value)


@pytest.fixture
def stage(clean_environment: Path) -> StageDir:
    stage = RunDir(clean_environment / "runs" / "r").stage("pretrain")
    recipe, runtime = {"steps": 1}, {"threads": 1, "ranks": 2}
    write_json(stage.config_path, {"schema": 1, "stage": "pretrain", "recipe": recipe, "runtime": runtime})
    return stage


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program in torchrun's place."""

    def replace(program: str) -> None:
        monkeypatch.setattr(nodes, "launch_command", lambda *_, **__: [sys.executable, "-c", program])

    replace(TORCHRUN.format(code=0))
    return replace


def lead(run: RunDir, work: Callable[[Board], None]) -> threading.Thread:
    """Be node 0's command in a thread."""

    def command() -> None:
        try:
            with Board(run) as board:
                work(board)
        except Exception:
            pass  # what the test made it raise

    thread = threading.Thread(target=command)
    thread.start()
    return thread


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def node_log(stage: StageDir) -> Path:
    return stage.log_dir / "attempt_1_node_1.log"


def answered(stage: StageDir) -> bool:
    return node_log(stage).is_file() and b"agent" in node_log(stage).read_bytes()


def files(run: RunDir) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("agent")
def test_a_follower_joins_each_attempt_and_ends_with_the_leader(
    stage: StageDir, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(board: Board) -> None:
        until(lambda: "waiting" in told())
        with board.attempt(stage, "r-pretrain-1"):
            until(lambda: answered(stage))
        with board.attempt(stage, "r-pretrain-2"):
            until((stage.log_dir / "attempt_2_node_1.log").is_file)

    heard = ""

    def told() -> str:
        nonlocal heard
        heard += capsys.readouterr().err
        return heard

    leader = lead(stage.run, work)
    follow(Output(), stage.run, ["pretrain"], SECOND)
    leader.join()
    shown = capsys.readouterr()
    heard += shown.err
    assert heard.splitlines()[-2:] == [f"node 1: joining `pretrain`, attempt `r-pretrain-{n}`" for n in (1, 2)]
    assert shown.out == "node 1 is done: run `r`, pretrain\n"
    # A follower leaves nothing in the run but what its torchrun said.
    logs = {f"pretrain/log/attempt_{n}_node_1.log" for n in (1, 2)}
    assert files(stage.run) == {"nodes", "pretrain/config.json"} | logs


def test_a_leaders_error_is_the_followers(stage: StageDir) -> None:
    def work(board: Board) -> None:
        time.sleep(0.1)
        raise ConfigError("bad rate", cause="it is 0", hint="raise it")

    leader = lead(stage.run, work)
    with pytest.raises(ConfigError) as caught:
        follow(Output(), stage.run, ["pretrain"], SECOND)
    leader.join()
    assert (caught.value.message, caught.value.cause, caught.value.hint) == ("bad rate", "it is 0", "raise it")


def test_a_board_that_does_not_change_is_of_a_command_long_gone(
    stage: StageDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nodes, "START_WAIT_S", 0.3)
    with Board(stage.run) as board, board.attempt(stage, "r-pretrain-1"):
        said = json.loads(stage.run.nodes_path.read_text())
    stage.run.nodes_path.write_text(json.dumps(said))
    with pytest.raises(HostError, match="node 0 does not start"):
        follow(Output(), stage.run, ["pretrain"], SECOND)
    assert "waiting for node 0 to start this command" in capsys.readouterr().err


def test_stages_that_are_done_need_no_leader(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "START_WAIT_S", 0.3)
    stage.write_record({"recipe": sha256_json({"steps": 1})}, [], {})
    follow(Output(), stage.run, ["pretrain"], SECOND)
    with pytest.raises(HostError):  # they start over, so the record is nothing
        follow(Output(), stage.run, ["pretrain"], SECOND, redo=["pretrain"])


def test_a_leader_that_falls_silent_is_gone(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOST_S", 0.3)
    stage.run.nodes_path.write_text("{}")
    timer = threading.Timer(0.1, lambda: stage.run.nodes_path.write_text(json.dumps({"beat": 7})))
    timer.start()
    with pytest.raises(WorkerError, match="node 0's command is gone"):
        follow(Output(), stage.run, ["pretrain"], SECOND)
    timer.join()


@pytest.mark.usefixtures("agent")
def test_a_follower_waits_for_the_config_it_was_told_of(stage: StageDir) -> None:
    """A shared disk may show an older one for a while."""
    stored, early = stage.config_path.read_text(), []

    def work(board: Board) -> None:
        with board.attempt(stage, "r-pretrain-1"):
            write_atomic(stage.config_path, stored.replace('"threads": 1', '"threads": 2'))
            time.sleep(0.3)
            early.append(node_log(stage).exists())
            write_atomic(stage.config_path, stored)
            until(lambda: answered(stage))

    leader = lead(stage.run, work)
    follow(Output(), stage.run, ["pretrain"], SECOND)
    leader.join()
    assert early == [False] and answered(stage)


def test_ctrl_c_on_a_follower_stops_all_nodes(stage: StageDir, agent: Callable[[str], None]) -> None:
    wait = f"while not os.path.exists({str(stage.stop_path)!r}): time.sleep(.02)"
    agent(f"print('agent', flush=True)\nimport os, time\n{wait}")

    def work(board: Board) -> None:
        with board.attempt(stage, "r-pretrain-1"):
            until(lambda: answered(stage))
            os.kill(os.getpid(), signal.SIGINT)
            until(stage.stop_path.exists)
        raise Interrupted("pretrain stopped")

    leader = lead(stage.run, work)
    with pytest.raises(Interrupted):
        follow(Output(), stage.run, ["pretrain"], SECOND)
    leader.join()
    assert stage.stop_path.exists()


def test_an_agent_that_fails_alone_is_started_again(
    stage: StageDir, agent: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    agent(TORCHRUN.format(code=1))

    def work(board: Board) -> None:
        with board.attempt(stage, "r-pretrain-1"):
            until(lambda: node_log(stage).is_file() and node_log(stage).read_text().count("agent") == 2)

    leader = lead(stage.run, work)
    follow(Output(), stage.run, ["pretrain"], SECOND)
    leader.join()
    assert "torchrun ended with exit code 1" in capsys.readouterr().err


def test_one_node_has_no_board(stage: StageDir) -> None:
    with nodes.leading(stage.run, Launch(nproc=2)) as board:
        assert board is None
    assert not stage.run.nodes_path.exists()
