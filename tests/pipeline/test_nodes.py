"""Several nodes and elastic restarts: two commands with a torchrun each, meeting on loopback over one run folder."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import torch
from safetensors.torch import load_file

from picollm.events import read_all
from picollm.run_dir import StageDir
from picollm.train.checkpoint_files import checkpoint_dir

STEPS = 50
SETS = ("--set", "train.dtype=float64", "--set", f"train.steps={STEPS}")


def steps_done(stage: StageDir) -> int:
    return max((event["step"] for event in read_all(stage.events_path) if event["kind"] == "step"), default=0)


def resumes(stage: StageDir) -> list[int]:
    return [e["resumed_from"] for e in read_all(stage.events_path) if e["kind"] == "stage_start"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def with_tokenizer(lab, run: str) -> StageDir:
    lab.ok("tokenizer", "train", "--run", run, "--config", str(lab.base / "small.toml"))
    return lab.run_dir(run).stage("pretrain")


def start_nodes(lab, run: str, *args: str):
    """The same command on two nodes, the one that follows first."""
    meet = f"nnodes=2,nproc=1,rdzv=127.0.0.1:{free_port()}"
    command = ("pretrain", "--run", run, *SETS, *args, "--launch")
    follower = lab.start(*command, f"{meet},node_rank=1")
    return lab.start(*command, f"{meet},node_rank=0"), follower


def ends(commands, code: int = 0) -> list[str]:
    """What the commands said on stderr; all must end with one exit code."""
    told = [command.communicate(timeout=240)[1] for command in commands]
    assert [command.returncode for command in commands] == [code] * len(told), told
    return told


def kill_rank_1(stage: StageDir) -> None:
    os.kill(int(stage.pid_path.read_text().split()[1]), signal.SIGKILL)


def test_two_nodes_survive_a_killed_worker_and_end_where_one_process_does(lab, wait_for, processes_of) -> None:
    """A worker dies on the node that follows; both torchruns start again from the checkpoint, by themselves."""
    one, two = with_tokenizer(lab, "one"), with_tokenizer(lab, "two")
    lab.ok("pretrain", "--run", "one", *SETS)
    leader, follower = start_nodes(lab, "two")
    wait_for(lambda: steps_done(two) >= 12, "12 steps on two nodes")
    (pids,) = [two.pid_path.read_text().split()]
    assert len(pids) == 2
    kill_rank_1(two)
    told, followed = ends((leader, follower))
    assert "started again" in told
    assert "joining `pretrain`, attempt `two-pretrain-1`" in followed
    first, again = resumes(two)
    assert first == 0 and again >= 10
    expected = load_file(checkpoint_dir(one, STEPS) / "model.safetensors")
    for name, tensor in load_file(checkpoint_dir(two, STEPS) / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-8)
    assert not processes_of(lab.base)


@pytest.mark.slow
def test_two_nodes_are_two_ranks_to_the_last_bit(lab) -> None:
    for name in ("ranks", "nodes"):
        with_tokenizer(lab, name)
    lab.ok("pretrain", "--run", "ranks", *SETS, "--launch", "nproc=2")
    ends(start_nodes(lab, "nodes"))
    assert lab.weights("nodes", "pretrain") == lab.weights("ranks", "pretrain")


@pytest.mark.slow
def test_a_killed_rank_on_one_node_costs_no_command(lab, wait_for) -> None:
    stage, _ = with_tokenizer(lab, "killed"), with_tokenizer(lab, "whole")
    command = lab.start("pretrain", "--run", "killed", *SETS, "--launch", "nproc=2")
    wait_for(lambda: steps_done(stage) >= 12, "12 steps")
    kill_rank_1(stage)
    assert "started again" in ends([command])[0]
    lab.ok("pretrain", "--run", "whole", *SETS, "--launch", "nproc=2")
    assert lab.weights("killed", "pretrain") == lab.weights("whole", "pretrain")


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_ctrl_c_on_any_node_saves_and_stops_all(lab, wait_for, node: int) -> None:
    stage = with_tokenizer(lab, "stopped")
    nodes = start_nodes(lab, "stopped", "--set", "train.checkpoint_every=1000")
    wait_for(lambda: steps_done(stage) >= 5, "5 steps on two nodes")
    nodes[node].send_signal(signal.SIGINT)
    told = ends(nodes, 130)[0]
    (saved,) = stage.finished_steps()
    assert f"state saved at step {saved}" in told
    ends(start_nodes(lab, "stopped"))
    assert resumes(stage) == [0, saved]


@pytest.mark.slow
def test_every_stage_on_two_nodes(lab) -> None:
    """`speedrun`: node 0 makes everything; pretraining and fine-tuning meet on the same port one after the other."""
    meet = f"nnodes=2,nproc=1,rdzv=127.0.0.1:{free_port()}"
    command = lab.speedrun("r", "--set", "train.steps=20", "--set", "sft.steps=10", "--launch")
    leader = lab.start(*command, f"{meet},node_rank=0")
    follower = lab.start(*command, f"{meet},node_rank=1")  # may come before there is a run
    followed = ends((leader, follower))[1]
    assert followed.count("joining") == 2
    assert lab.ok("manifest", "verify", "--run", "r").returncode == 0
    again = lab.ok(*command, f"{meet},node_rank=1")  # done on node 0 long ago: nothing to wait for
    assert "waiting" not in again.stderr
