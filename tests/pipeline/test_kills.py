"""kill -9 of worker or command at twenty random moments, saving included: the weights end the same. Minutes long."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest

from picollm.events import read_all
from picollm.run_dir import StageDir
from picollm.train.checkpoint_files import checkpoint_dir, verify

pytestmark = pytest.mark.slow
KILLS, INSIDE_A_SAVE, SEED = 20, 6, 7
# Long enough that twenty kills do not outlast it, and as many saves as there can be.
SETS = ("--set", "train.steps=1500", "--set", "train.checkpoint_every=3", "--skip", "eval")


def step_events(stage: StageDir) -> int:
    return sum(event["kind"] == "step" for event in read_all(stage.events_path))


def test_twenty_kills_end_at_the_same_weights(
    lab, make_lab, small_base, tmp_path, wait_for, processes_of, kill_inside_a_save
) -> None:
    shutil.copytree(small_base, tmp_path / "whole")
    whole = make_lab(tmp_path / "whole")
    whole.ok(*whole.speedrun("r", *SETS))

    rng = random.Random(SEED)
    inside = set(rng.sample(range(KILLS), INSIDE_A_SAVE))
    run = lab.run_dir("r")
    for number in range(KILLS):
        stage = run.stage("pretrain" if run.stage("pretrain").record() is None else "sft")
        before = step_events(stage)
        command = lab.start(*lab.speedrun("r", *SETS))
        steps = rng.randint(1, 25)
        wait_for(lambda: step_events(stage) >= before + steps or stage.record() is not None, f"{steps} steps")  # noqa: B023
        assert stage.record() is None, f"stage {stage.name} ended before kill {number + 1}"
        if number in inside:
            kill_inside_a_save(stage)
        else:
            time.sleep(rng.random() * 0.1)
            victim = rng.choice(["worker", "command"])
            os.kill(command.pid if victim == "command" else int(stage.pid_path.read_text().split()[0]), signal.SIGKILL)
        command.communicate(timeout=60)
        wait_for(lambda: not processes_of(lab.base), "the processes to end")
        for step in stage.finished_steps():  # whatever was interrupted, what has a name is whole
            verify(checkpoint_dir(stage, step))

    lab.ok(*lab.speedrun("r", *SETS))
    starts = [event for event in read_all(run.stage("pretrain").events_path) if event["kind"] == "stage_start"]
    assert len(starts) > KILLS // 2
    for name in ("pretrain", "sft"):
        assert lab.weights("r", name) == whole.weights("r", name)
    lab.ok("manifest", "verify", "--run", "r")
