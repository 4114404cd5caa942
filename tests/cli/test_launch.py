"""Launching a stage, with a real process that speaks the worker's protocol but trains nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from picollm.errors import ConfigError, HostError, Interrupted, WorkerError
from picollm.files import sha256_json, write_json
from picollm.locks import hold_lock
from picollm.run_dir import RunDir, StageDir
from picollm_cli import launch
from picollm_cli.console import Output
from picollm_cli.launch import run_stage
from picollm_cli.launch_line import Launch, launch_command, parse_launch

HERE = Path(__file__).parent
Make = Callable[..., StageDir]


@pytest.fixture
def make_stage(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A prepared stage whose worker is `fake_worker`."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def make(behaviour: str = "succeed", *, steps: int = 3, sleep_s: float = 0.0) -> StageDir:
        stage = RunDir(clean_environment / "runs" / "r").stage("pretrain")
        recipe = {"behaviour": behaviour, "steps": steps, "sleep_s": sleep_s}
        write_json(
            stage.config_path,
            {"schema": 1, "stage": "pretrain", "recipe": recipe, "runtime": {"threads": 3, "ranks": 1}},
        )
        return stage

    return make


def run(stage: StageDir, *, as_json: bool = False) -> dict[str, Any]:
    return run_stage(Output(as_json), stage, "fake_worker")


def when(condition: Callable[[], bool], action: Callable[[], None]) -> threading.Thread:
    """Do something in this process as soon as something is so (within 20 s)."""

    def wait() -> None:
        deadline = time.monotonic() + 20
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def has_stepped(stage: StageDir) -> bool:
    return stage.events_path.is_file() and b'"step"' in stage.events_path.read_bytes()


def test_success_returns_the_record_and_leaves_no_traces_of_work(make_stage: Make) -> None:
    stage = make_stage()
    record = run(stage)
    assert record["result"] == {"step": 3, "loss": 0.5, "tokens": 3}
    assert not stage.launcher_path.exists()
    assert not stage.stop_path.exists()
    log = (stage.log_dir / "attempt_1.log").read_text()
    assert log == f"threads 3 cwd {stage.run.base}\n"


def test_a_done_stage_is_not_started_again(make_stage: Make) -> None:
    stage = make_stage()
    first = run(stage)
    assert run(stage) == first
    assert not (stage.log_dir / "attempt_2.log").exists()


def test_the_record_counts_more_than_the_exit_code(make_stage: Make) -> None:
    assert run(make_stage("aborts_after"))["result"]["step"] == 3


def test_json_is_the_event_stream(make_stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make_stage()
    run(stage, as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == stage.events_path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["stage_start", "step", "step", "step", "stage_end"]


def test_plain_line_names_step_loss_and_pace(make_stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_stage())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pretrain 3/3  loss 0.") and "100 tok/s  102 MiB" in shown.err


def test_an_error_of_ours_comes_back_as_it_was(make_stage: Make) -> None:
    with pytest.raises(ConfigError) as caught:
        run(make_stage("config_error"))
    assert (caught.value.message, caught.value.cause, caught.value.hint) == ("bad rate", "it is 0", "raise it")


def test_any_other_exception_is_a_worker_error_with_rank_cause_and_log(make_stage: Make) -> None:
    stage = make_stage("bug")
    with pytest.raises(WorkerError) as caught:
        run(stage)
    assert "rank 3: RuntimeError: boom" in str(caught.value.cause)
    assert "the last words" in str(caught.value.cause)
    assert str(stage.log_dir / "attempt_1.log") in str(caught.value.hint)


def test_a_silent_death_names_the_signal(make_stage: Make) -> None:
    with pytest.raises(WorkerError) as caught:
        run(make_stage("killed"))
    assert "SIGKILL" in str(caught.value.cause)


def test_a_stale_error_is_not_taken_for_a_new_one(make_stage: Make) -> None:
    stage = make_stage("killed")
    stage.log_dir.mkdir(parents=True)
    (stage.log_dir / "error.json").write_text('{"type": "ConfigError", "message": "old", "cause": null, "hint": null}')
    stage.stop_path.touch()
    with pytest.raises(WorkerError, match="died"):
        run(stage)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops(
    make_stage: Make, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = make_stage(steps=2000, sleep_s=0.02)
    thread = when(lambda: has_stepped(stage), lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as caught:
        run(stage)
    thread.join()
    step = int(next(stage.checkpoints.iterdir()).name.removeprefix("step_"))
    assert caught.value.message == f"pretrain stopped, state saved at step {step}"
    assert "same command again" in str(caught.value.hint)
    assert "saving first" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_signal_kills(make_stage: Make) -> None:
    stage = make_stage("deaf", steps=2000, sleep_s=0.02)
    first = when(lambda: has_stepped(stage), interrupt)
    second = when(stage.stop_path.exists, lambda: (time.sleep(0.5), interrupt())[1])
    started = time.monotonic()
    with pytest.raises(Interrupted, match="was killed"):
        run(stage)
    first.join()
    second.join()
    assert time.monotonic() - started < 20
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(stage.path) in (p.info["cmdline"] or [])]


def test_a_stage_in_use_is_refused_with_the_pid(make_stage: Make) -> None:
    stage = make_stage()
    code = f"""
import time
from pathlib import Path
from picollm.locks import hold_lock
with hold_lock(Path({str(stage.lock_path)!r}), "stage"):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        try:
            with pytest.raises(HostError) as caught:
                run(stage)
        finally:
            holder.kill()
    assert str(holder.pid) in str(caught.value.cause)
    assert not stage.events_path.exists()


def test_an_orphan_is_waited_for(make_stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make_stage()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stage.launcher_path.write_text(f"{gone.pid} 1.0\n")
    released = threading.Event()

    def hold() -> None:
        with hold_lock(stage.lock_path, "stage"):
            held.set()
            released.wait(20)

    held = threading.Event()
    orphan = threading.Thread(target=hold)
    orphan.start()
    held.wait(20)
    timer = threading.Timer(0.3, released.set)
    timer.start()
    assert run(stage)["result"]["step"] == 3
    orphan.join()
    assert "lost its parent" in capsys.readouterr().err


def test_an_orphan_that_never_ends_is_an_error(make_stage: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ORPHAN_WAIT_S", 0.1)
    stage = make_stage()
    stage.launcher_path.write_text("999999999 1.0\n")
    with hold_lock(stage.lock_path, "stage"), pytest.raises(HostError, match="in use"):
        run(stage)


def test_done_means_the_recipe_matches(make_stage: Make) -> None:
    run(make_stage())
    stage = make_stage(steps=4)
    assert run(stage)["inputs"] == {"recipe": sha256_json(stage.read_config()["recipe"])}
    assert (stage.log_dir / "attempt_2.log").exists()


# -- the command line -------------------------------------------------------------------------------------------------


def test_one_process_without_gpu_runs_the_module_itself(make_stage: Make) -> None:
    stage = make_stage()
    command = launch_command(stage, "picollm.stages.pretrain", Launch(), has_gpu=False)
    assert command == [sys.executable, "-m", "picollm.stages.pretrain", str(stage.path)]


def test_several_processes_go_through_torchrun(make_stage: Make) -> None:
    stage = make_stage()
    command = launch_command(stage, "m", parse_launch("nproc=2"), has_gpu=False)
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=0"]
    assert command[-4:] == ["--standalone", "-m", "m", str(stage.path)]
    nodes = launch_command(stage, "m", parse_launch("nproc=8,nnodes=2,node_rank=1,rdzv=h:29500"), has_gpu=True)
    assert {"--nnodes=2", "--node-rank=1", "--rdzv-backend=c10d", "--rdzv-endpoint=h:29500"} <= set(nodes)
    assert "--standalone" not in nodes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nporc=2", "did you mean `nproc`"),
        ("nproc", "not `key=value`"),
        ("nproc=0", "whole number from 1"),
        ("nproc=two", "whole number from 1"),
        ("nnodes=2", "`rdzv` is missing"),
        ("nnodes=2,node_rank=2,rdzv=h:1", "numbered 0 to 1"),
    ],
)
def test_a_bad_launch_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_launch(text)
    assert complaint in f"{caught.value.cause} {caught.value.hint}"
