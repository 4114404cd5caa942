"""The whole pipeline on a tiny run: end to end, again, interrupted in every way, and on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from picollm.events import read_all, read_events
from picollm.run_dir import StageDir
from picollm.train.checkpoint_files import checkpoint_dir


def steps_done(stage: StageDir) -> int:
    return max((event["step"] for event in read_all(stage.events_path) if event["kind"] == "step"), default=0)


def resumes(stage: StageDir) -> list[int]:
    return [e["resumed_from"] for e in read_all(stage.events_path) if e["kind"] == "stage_start"]


def test_every_stage_leaves_what_it_promises(reference) -> None:
    run = reference.run_dir("r")
    for name in ("tokenizer", "pretrain", "sft"):
        assert run.stage(name).record() is not None
    for name in ("report.md", "report.json", "manifest.json", "eval/sft-bpb/results.json"):
        assert (run.path / name).is_file()
    assert run.stage("pretrain").finished_steps() == [195, 200]
    losses = [event["loss"] for event in read_events(run.stage("pretrain").events_path) if event["kind"] == "step"]
    assert len(losses) == 200 and losses[-1] < losses[0] - 1
    # The chat tasks are the toy world's; this run was tuned on other conversations.
    assert not (run.path / "eval/sft-chat").exists()
    assert reference.ok("manifest", "verify", "--run", "r").returncode == 0
    reply = reference.ok("chat", "--run", "r", "-p", "Say cat")
    assert reply.stdout.strip()


def test_a_finished_run_is_left_as_it_is(reference) -> None:
    before = {p: p.stat().st_mtime_ns for p in reference.run_dir("r").path.rglob("*.safetensors")}
    again = reference.ok(*reference.speedrun("r"))
    assert again.stderr.count("already done") == 7
    assert before == {p: p.stat().st_mtime_ns for p in reference.run_dir("r").path.rglob("*.safetensors")}


def test_killed_workers_and_commands_end_at_the_same_weights(
    lab, reference, wait_for, processes_of, kill_inside_a_save
) -> None:
    """kill -9 of the worker inside a save, of the command, of the worker in SFT; then the same command again."""
    run = lab.run_dir("r")
    pretrain, sft = run.stage("pretrain"), run.stage("sft")
    command = lab.speedrun("r")

    first = lab.start(*command)
    wait_for(lambda: steps_done(pretrain) >= 7, "7 steps of pretraining")
    kill_inside_a_save(pretrain)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 7, error
    assert "SIGKILL" in error
    assert len(list(pretrain.checkpoints.glob("*.tmp"))) == 1

    second = lab.start(*command)
    wait_for(lambda: steps_done(pretrain) >= 25 and len(resumes(pretrain)) == 2, "a resumed pretraining")
    second.kill()
    second.communicate()
    third = lab.start(*command)  # at once: it waits until the orphan has saved
    wait_for(lambda: len(sft.finished_steps()) >= 1, "a checkpoint of SFT")
    os.kill(int(sft.pid_path.read_text().split()[0]), signal.SIGKILL)
    assert third.communicate(timeout=60) and third.returncode == 7
    wait_for(lambda: not processes_of(lab.base), "orphans to end", 30)

    lab.ok(*command)
    assert any(start > 0 for start in resumes(pretrain)) and any(start > 0 for start in resumes(sft))
    assert not list(pretrain.checkpoints.glob("*.tmp"))
    for stage in ("pretrain", "sft"):
        assert lab.weights("r", stage) == reference.weights("r", stage)
    assert not processes_of(lab.base)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_first(lab, reference, wait_for, number: signal.Signals) -> None:
    pretrain = lab.run_dir("r").stage("pretrain")
    command = lab.start(*lab.speedrun("r", "--set", "train.checkpoint_every=1000"))
    wait_for(lambda: steps_done(pretrain) >= 7, "7 steps")
    command.send_signal(number)
    _, error = command.communicate(timeout=60)
    assert command.returncode == 130, error
    saved = pretrain.finished_steps()
    assert len(saved) == 1 and saved[0] >= 7
    assert f"state saved at step {saved[0]}" in error
    lab.ok(*lab.speedrun("r"))
    assert resumes(pretrain) == [0, saved[0]]
    assert lab.weights("r", "pretrain") == reference.weights("r", "pretrain")


def go_back(stage: StageDir, step: int) -> None:
    """Make a finished stage one that was interrupted after a step."""
    stage.record_path.unlink()
    for later in (saved for saved in stage.finished_steps() if saved > step):
        shutil.rmtree(checkpoint_dir(stage, later))


def test_any_number_of_ranks_follows_one(lab, processes_of) -> None:
    """Gradients are really shared, and so is the state: float64, 50 steps, 1e-8, on 2 ranks and on 2, then 1, then 2.

    The rows that two ranks draw together are the one rank's.
    """
    sets = ("--set", "train.dtype=float64", "--set", "train.steps=50", "--set", "train.keep_last=9")
    lab.ok(*lab.speedrun("one", *sets, "--skip", "sft", "--skip", "eval"))
    lab.ok(*lab.speedrun("two", *sets, "--skip", "sft", "--skip", "eval", "--launch", "nproc=2"))
    one, two = (lab.run_dir(name).stage("pretrain") for name in ("one", "two"))
    assert json.loads(two.config_path.read_text())["runtime"]["ranks"] == 2

    def follow() -> None:
        wanted = load_file(checkpoint_dir(one, 50) / "model.safetensors")
        found = load_file(checkpoint_dir(two, 50) / "model.safetensors")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-8)
        losses = [
            [event["loss"] for event in read_events(stage.events_path) if event["kind"] == "step"]
            for stage in (one, two)
        ]
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-6

    follow()
    for step, ranks in ((20, 1), (40, 2)):
        go_back(two, step)
        lab.ok("pretrain", "--run", "two", "--launch", f"nproc={ranks}")
        written = {path.name for path in (checkpoint_dir(two, 50) / "state").glob("rank_*")}
        assert written == {f"rank_{rank}-of-{ranks}.safetensors" for rank in range(ranks)}
        follow()
    assert resumes(two) == [0, 20, 40]
    assert not processes_of(lab.base)


def test_a_damaged_newest_checkpoint_costs_a_few_steps_only(lab, reference, wait_for) -> None:
    pretrain = lab.run_dir("r").stage("pretrain")
    command = lab.start(*lab.speedrun("r"))
    wait_for(lambda: len(pretrain.finished_steps()) >= 2, "two checkpoints")
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    *_, before, newest = pretrain.finished_steps()
    weights = checkpoint_dir(pretrain, newest) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = lab.ok(*lab.speedrun("r"))
    assert f"step {newest} is damaged" in done.stderr
    assert resumes(pretrain)[-1] == before
    assert lab.weights("r", "sft") == reference.weights("r", "sft")


def test_a_second_command_on_the_same_run_is_refused(lab, wait_for) -> None:
    command = lab.start(*lab.speedrun("r"))
    wait_for(lambda: steps_done(lab.run_dir("r").stage("pretrain")) >= 1, "a step")
    second = lab.run(*lab.speedrun("r"))
    assert second.returncode == 3
    assert f"process {command.pid} holds" in second.stderr
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
