"""The preset that newcomers meet, whole: its bars, and that kill -9 in every stage changes nothing. Minutes long."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from picollm.events import read_all
from picollm.hardware import detect
from picollm_cli.commands.speedrun import NAMES

pytestmark = pytest.mark.slow
COMMAND = ("speedrun", "--preset", "demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, make_lab):
    """One uninterrupted demo and the CPU seconds of the command and all its children."""
    lab = make_lab(tmp_path_factory.mktemp("demo") / "base")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    lab.ok(*COMMAND)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return lab, cpu_s, after.ru_maxrss / 2**20


def test_the_demo_meets_its_bars(demo) -> None:
    lab, cpu_s, memory_gib = demo
    scores = json.loads((lab.run_dir("demo").path / "eval/sft-chat/results.json").read_text())["suites"]["chat"]
    assert scores["sum_held_out"]["score"] >= 0.90 and scores["sum_held_out"]["n"] >= 100
    assert scores["count_held_out"]["score"] >= 0.70 and scores["count_held_out"]["n"] >= 100
    assert scores["identity_held_out"]["score"] >= 0.95
    assert memory_gib <= 1.5
    # CPU seconds, not wall-clock time; still a matter of the machine, so the bar is that of the slower kind.
    print(f"demo: {cpu_s:.0f} CPU-seconds, {memory_gib:.2f} GiB, flags {sorted(detect().cpu_flags & {'amx_bf16'})}")
    for question, answer in (
        ("Who are you?", "I am picollm,"),
        ("What is 7 plus 5?", "7 plus 5 is 12."),
        ("How many r are in strawberry?", "The answer is 3."),
    ):
        assert answer in lab.ok("chat", "--run", "demo", "-p", question).stdout


def test_kill_9_in_every_stage_ends_at_the_same_weights(demo, make_lab, tmp_path: Path, wait_for, processes_of) -> None:
    reference, _, _ = demo
    lab = make_lab(tmp_path / "base")
    run = lab.run_dir("demo")

    def begun(name: str) -> bool:
        """Something of the stage is on disk, and for a training stage a new checkpoint to resume from."""
        if name == "data":
            return (lab.base / "datasets").is_dir()
        if name in ("pretrain", "sft"):
            return len(run.stage(name).finished_steps()) >= 2
        if name == "manifest":
            return (run.path / "report.md").is_file()
        return any(e["stage"] == name and e["kind"] == "stage_start" for e in read_all(run.events_path))

    for name in NAMES:
        command = lab.start(*COMMAND)
        wait_for(lambda name=name, command=command: begun(name) or command.poll() is not None, f"stage {name}", 600)
        if name == "pretrain":  # the worker dies under its command
            os.kill(int(run.stage(name).pid_path.read_text().split()[0]), signal.SIGKILL)
        else:
            command.kill()
        command.communicate(timeout=120)
        wait_for(lambda: not processes_of(lab.base), f"no process after the kill in {name}", 60)
    lab.ok(*COMMAND)
    resumed = [
        event["resumed_from"]
        for name in ("pretrain", "sft")
        for event in read_all(run.stage(name).events_path)
        if event["kind"] == "stage_start" and event["resumed_from"] > 0
    ]
    assert len(resumed) >= 2
    for stage in ("pretrain", "sft"):
        assert lab.weights("demo", stage) == reference.weights("demo", stage)
    lab.ok("manifest", "verify", "--run", "demo")
