"""Launching a stage, with a real process that speaks the worker's protocol but trains nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from picollm import hardware, torch_facts
from picollm.errors import ConfigError, HostError, Interrupted, OutOfMemory, WorkerError
from picollm.events import read_all
from picollm.files import sha256_json, write_json
from picollm.locks import hold_lock
from picollm.run_dir import RunDir, StageDir
from picollm_cli import launch
from picollm_cli.console import Output
from picollm_cli.launch import run_stage
from picollm_cli.launch_line import (
    Launch,
    attempt_id,
    check_launch,
    launch_command,
    launch_commands,
    parse_launch,
)

HERE = Path(__file__).parent
Make = Callable[..., StageDir]


@pytest.fixture
def make_stage(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A prepared stage whose worker is `fake_worker`."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))

    def make(
        behaviour: str = "succeed", *, steps: int = 3, sleep_s: float = 0.0, rows: int = 1, rows_that_fit: int = 0
    ) -> StageDir:
        stage = RunDir(clean_environment / "runs" / "r").stage("pretrain")
        recipe = {"behaviour": behaviour, "steps": steps, "sleep_s": sleep_s, "rows_that_fit": rows_that_fit}
        runtime = {"threads": 3, "ranks": 1, "device_batch_size": rows}
        write_json(stage.config_path, {"schema": 1, "stage": "pretrain", "recipe": recipe, "runtime": runtime})
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


def test_a_stop_is_not_the_error_of_ranks_that_were_started_again(make_stage: Make) -> None:
    stage = make_stage(steps=2000, sleep_s=0.02)

    def fail_and_stop() -> None:
        write_json(
            stage.log_dir / "error.json", {"type": "PicollmError", "message": "old", "cause": None, "hint": None}
        )
        time.sleep(0.05)
        interrupt()

    thread = when(lambda: has_stepped(stage), fail_and_stop)
    with pytest.raises(Interrupted, match="state saved"):
        run(stage)
    thread.join()


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


def test_out_of_memory_goes_on_with_fewer_rows(make_stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stage = make_stage("out_of_memory", rows=8, rows_that_fit=2)
    assert run(stage)["result"]["step"] == 3
    assert [path.name for path in sorted(stage.log_dir.glob("*.log"))] == [f"attempt_{n}.log" for n in (1, 2, 3)]
    assert "out of memory with 4 rows at a time; started again with 2" in capsys.readouterr().err
    texts = [event["text"] for event in read_all(stage.run.events_path) if event["kind"] == "note"]
    assert len(texts) == 2 and "with 8 rows" in texts[0]


def test_out_of_memory_ends_when_the_batch_shrinks_no_more(make_stage: Make) -> None:
    stage = make_stage("out_of_memory_stuck", rows=8)
    with pytest.raises(OutOfMemory, match="out of memory with 8"):
        run(stage)
    assert not (stage.log_dir / "attempt_2.log").exists()


def test_a_stop_outlives_a_worker_that_is_just_starting(make_stage: Make) -> None:
    """It takes the file for one of an earlier attempt and removes it."""
    stage = make_stage("slow_start", steps=2000, sleep_s=0.02)
    thread = when(stage.events_path.exists, interrupt)
    with pytest.raises(Interrupted, match="state saved at step"):
        run(stage)
    thread.join()


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


def test_one_signal_ends_a_worker_that_compiles(make_stage: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """It could not look for minutes, and has taken no step since its last checkpoint."""
    stage = make_stage("compiling")
    thread = when(lambda: any(event["kind"] == "phase" for event in read_all(stage.events_path)), interrupt)
    with pytest.raises(Interrupted, match=r"^pretrain stopped$"):
        run(stage)
    thread.join()
    assert "nothing to save" in capsys.readouterr().err
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(stage.path) in (p.info["cmdline"] or [])]


def test_a_full_disk_is_told_once_while_training_goes_on(
    make_stage: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker's own warning is an event, for which there is no room."""
    stage = make_stage(steps=20, sleep_s=0.05)
    monkeypatch.setattr("picollm_cli.launch.LOOK_FOR_ROOM_S", 0.0)
    monkeypatch.setattr("picollm.hardware.disk_free", lambda path: 4096)
    assert run(stage)["result"]["step"] == 20
    assert capsys.readouterr().err.count("is full: pretrain goes on but can save nothing") == 1


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
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]
    assert command[-4:] == ["--standalone", "-m", "m", str(stage.path)]
    alone = launch_command(stage, "m", parse_launch("nproc=1,restarts=1"), has_gpu=False)
    assert "--max-restarts=1" in alone


def test_nodes_meet_at_node_0_whose_ranks_come_first(make_stage: Make) -> None:
    stage = make_stage()
    first, second = launch_commands(
        stage, "m", parse_launch("nproc=8,nnodes=2,rdzv=h-0:29500,restarts=1"), has_gpu=True
    )
    shared = {"--nnodes=2", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-endpoint=h-0:29500"}
    assert shared | {"--rdzv-id=r-pretrain-1"} <= set(first) & set(second)
    assert "--standalone" not in first
    names = [part.partition("=")[2] for command in (first, second) for part in command if "--local-addr" in part]
    assert names == sorted(names) and names[0] == "h-0"
    conf = [part.partition("is_host=")[2][0] for command in (first, second) for part in command if "is_host" in part]
    assert conf == ["1", "0"]


def test_no_two_attempts_have_one_name(make_stage: Make) -> None:
    stage = make_stage()
    run(stage)
    assert attempt_id(stage) == "r-pretrain-2"
    stage.run.move_to_old(["pretrain"])
    assert attempt_id(make_stage()) == "r-pretrain-2"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU, and a torch that knows no NCCL."""
    gpu = hardware.Gpu(0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "570")
    machine = dataclasses.replace(hardware.detect(), gpus=(gpu,))
    monkeypatch.setattr(hardware, "detect", lambda: machine)
    facts = {"torch": "2.11.0", "distributed": {"gloo": True, "nccl": False}}
    monkeypatch.setattr(torch_facts, "torch_facts", lambda machine: facts)


@pytest.mark.usefixtures("one_gpu")
def test_more_processes_than_gpus_are_refused_on_any_node() -> None:
    for text in ("nproc=2", "nproc=2,nnodes=2,node_rank=1,rdzv=h:1"):
        with pytest.raises(ConfigError) as caught:
            check_launch(parse_launch(text))
        assert "`--launch nproc=1`" in str(caught.value.hint)


def test_a_meeting_point_that_no_name_server_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun would try for minutes."""

    def unknown(*args: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(HostError, match="`rdzv=nowhere:29500` names no machine") as caught:
        check_launch(parse_launch("nnodes=2,rdzv=nowhere:29500"))
    assert caught.value.cause == "Name or service not known"


@pytest.mark.usefixtures("one_gpu")
def test_several_gpus_need_nccl() -> None:
    check_launch(Launch())
    with pytest.raises(HostError, match="need NCCL") as caught:
        check_launch(parse_launch("nnodes=2,rdzv=h:1"))
    assert "torch 2.11.0" in str(caught.value.cause)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nporc=2", "did you mean `nproc`"),
        ("nproc", "not `key=value`"),
        ("nproc=0", "whole number from 1"),
        ("nproc=two", "whole number from 1"),
        ("restarts=-1", "whole number from 0"),
        ("nnodes=2", "`rdzv` is missing"),
        ("nnodes=2,rdzv=h", "node 0's name or address and a free port"),
        ("nnodes=2,rdzv=h:0", "node 0's name or address and a free port"),
        ("nnodes=2,rdzv=h:65536", "node 0's name or address and a free port"),
        ("nproc=1,nproc=2", "says `nproc` twice"),
        ("nnodes=2,node_rank=2,rdzv=h:1", "numbered 0 to 1"),
    ],
)
def test_a_bad_launch_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_launch(text)
    assert complaint in f"{caught.value.cause} {caught.value.hint}"
