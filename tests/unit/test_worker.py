"""The process around a stage: why it stops, how it ends, and what it leaves for its parent."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import DistBackendError

from picollm import worker as worker_module
from picollm.errors import ConfigError, Diverged, IntegrityError, Interrupted, OutOfMemory, PicollmError
from picollm.events import read_all
from picollm.files import write_json
from picollm.run_dir import StageDir, run_named
from picollm.worker import Worker, launcher_lives, start_of

# A stage of one argument; the body decides how it ends.
STAGE = """
import sys
from picollm.errors import ConfigError, Interrupted
from picollm.worker import run
def main(worker):
    worker.start(total_steps=1)
    {body}
run(main)
"""


@pytest.fixture
def stage(clean_environment: Path) -> StageDir:
    stage = run_named("r").stage("pretrain")
    write_json(stage.config_path, {"schema": 1, "stage": "pretrain", "recipe": {}, "runtime": {"threads": 1}})
    return stage


@pytest.fixture
def worker(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker in this process that looks every time; its signal handlers are taken back."""
    monkeypatch.setattr(worker_module, "LOOK_EVERY_S", 0.0)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made = Worker(stage, stage.read_config(), 0, 1)
    yield made
    assert made.events is not None
    made.events.close()
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(stage: StageDir, body: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STAGE.format(body=body), stage.path]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)


# -- when to stop -----------------------------------------------------------------------------------------------------


def test_a_stop_file_stops(worker: Worker) -> None:
    assert not worker.should_stop()
    worker.stage.stop_path.touch()
    assert worker.should_stop()
    worker.stage.stop_path.unlink()
    assert worker.should_stop()  # once asked, it stays asked


def test_it_looks_at_most_once_in_a_while(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not worker.should_stop()
    monkeypatch.setattr(worker_module, "LOOK_EVERY_S", 60.0)
    worker.stage.stop_path.touch()
    assert not worker.should_stop()


def test_a_signal_while_it_looks_is_not_forgotten(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def lives(stage: StageDir) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(worker_module, "launcher_lives", lives)
    assert worker.should_stop()


def test_a_signal_stops(worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not worker.should_stop() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert worker.should_stop()


def test_a_parent_that_is_gone_stops(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module.os, "getppid", lambda: 1_000_000)
    assert worker.should_stop()


def test_a_launcher_that_is_gone_stops(worker: Worker) -> None:
    stage, me = worker.stage, psutil.Process()
    stage.launcher_path.write_text(f"{me.pid} {start_of(me.pid)}\n")
    assert launcher_lives(stage) and not worker.should_stop()
    stage.launcher_path.write_text("12")  # being written
    assert launcher_lives(stage)
    # The number lives on in another process.
    stage.launcher_path.write_text(f"{me.pid} {start_of(me.pid) - 3600}\n")
    assert not launcher_lives(stage) and worker.should_stop()


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the system itself keeps the time of a process's start")
def test_a_clock_that_is_set_stops_nothing(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the clock, as after a laptop slept, moves the time of boot, and with it every start psutil tells."""
    me = psutil.Process()
    told = me.create_time()
    worker.stage.launcher_path.write_text(f"{me.pid} {start_of(me.pid)}\n")
    assert launcher_lives(worker.stage)
    stat = Path("/proc/stat").read_text()
    boot = int(re.search(r"^btime (\d+)$", stat, re.MULTILINE)[1])
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "stat").write_text(stat.replace(f"btime {boot}", f"btime {boot - 3600}"))
    (proc / str(me.pid)).symlink_to(f"/proc/{me.pid}")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    assert launcher_lives(worker.stage) and not worker.should_stop()
    assert psutil.Process().create_time() == pytest.approx(told - 3600, abs=1), "the clock has not been set"


def test_a_launcher_on_another_machine_cannot_be_seen(stage: StageDir) -> None:
    stage.launcher_path.write_text("1 1.0 some-other-host")
    assert launcher_lives(stage)
    stage.launcher_path.write_text(f"{os.getpid()} 1.0 {socket.gethostname()}")
    assert not launcher_lives(stage)


# Rank 1 of two waits in vain for its peer; its parent dies as soon as it has told the number.
ORPHAN = """
import subprocess, sys
child = '''
import sys, time
from pathlib import Path
from picollm import worker
from picollm.run_dir import StageDir
worker.LOOK_EVERY_S = worker.ORPHAN_EXIT_S = 0.05
worker.Worker(StageDir(Path(sys.argv[1])), {}, 1, 2).leave_when_orphaned()
print(flush=True)
time.sleep(60)
'''
process = subprocess.Popen([sys.executable, "-c", child, *sys.argv[1:]], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid)
"""


def test_a_rank_whose_peers_do_not_answer_leaves_after_its_parent(stage: StageDir) -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHAN, stage.path], capture_output=True, text=True, timeout=60)
    rank = int(parent.stdout)

    def gone() -> bool:
        try:
            return psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    deadline = time.monotonic() + 30
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone()


def test_a_launcher_whose_number_nobody_has(stage: StageDir) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        other.wait()
    stage.launcher_path.write_text(f"{other.pid} 1.0\n")
    assert not launcher_lives(stage)


# -- how it ends ------------------------------------------------------------------------------------------------------


def test_a_stage_that_succeeds(stage: StageDir) -> None:
    stage.stop_path.touch()
    write_json(stage.log_dir / "error.json", {"stale": True})
    process = ended(stage, "assert not worker.should_stop() and worker.stage.pid_path.read_text().strip().isdigit()")
    assert process.returncode == 0, process.stderr
    start, end = read_all(stage.events_path)
    assert (start["kind"], start["attempt"], start["total_steps"]) == ("stage_start", 1, 1)
    assert (end["kind"], end["ok"]) == ("stage_end", True)
    assert not any(path.exists() for path in (stage.stop_path, stage.pid_path, stage.log_dir / "error.json"))


def test_an_error_of_ours_is_told_with_its_exit_code(stage: StageDir) -> None:
    process = ended(stage, 'raise ConfigError("no such value", cause="it is 7", hint="use 8")')
    assert process.returncode == 2 and "Traceback" in process.stderr
    told = json.loads((stage.log_dir / "error.json").read_text())
    assert told.pop("traceback").endswith("ConfigError: no such value\n")
    assert told == {
        "type": "ConfigError", "message": "no such value", "cause": "it is 7", "hint": "use 8", "exit_code": 2,
        "rank": 0,
    }  # fmt: skip
    assert read_all(stage.events_path)[-1]["reason"] == "ConfigError"


def test_a_stop_is_no_error(stage: StageDir) -> None:
    process = ended(stage, 'raise Interrupted("stopped at step 1")')
    assert (process.returncode, process.stderr) == (130, "")
    assert not (stage.log_dir / "error.json").exists()
    end = read_all(stage.events_path)[-1]
    assert (end["ok"], end["reason"], end["text"]) == (False, "stopped", "stopped at step 1")


# NCCL takes its memory from the device itself, where torch has most of it.
NCCL_ERROR = "NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error\nncclUnhandledCudaError: Last error:\n"


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (MemoryError(), OutOfMemory, 7),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory, 7),
        (RuntimeError("std::bad_alloc"), OutOfMemory, 7),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemory, 7),
        (RuntimeError("Triton Error [CUDA]: out of memory"), OutOfMemory, 7),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), OutOfMemory, 7),
        (DistBackendError(f"{NCCL_ERROR}Cuda failure 2 'out of memory'"), OutOfMemory, 7),
        (ZeroDivisionError("division by zero"), PicollmError, 1),
        (Interrupted("x"), Interrupted, 130),
    ],
)
def test_what_an_exception_becomes(stage: StageDir, error: BaseException, kind: type, code: int) -> None:
    assert type(worker_module.as_known(error)) is kind
    assert worker_module._report(stage, error, 1) == code
    path = stage.log_dir / "error.json"
    assert path.exists() == (code != 130)
    if path.exists():
        assert json.loads(path.read_text())["rank"] == 1
        # The first rank to fail tells: what the others say afterwards is noise.
        worker_module._report(stage, ValueError("later"), 0)
        assert json.loads(path.read_text())["rank"] == 1


@pytest.mark.parametrize("how", ["Connection closed by peer [127.0.0.1]:29500", "Read error: Connection reset by peer"])
def test_gloo_that_lost_a_rank_is_told_so(how: str) -> None:
    """Which of the two it says depends on what was under way when that rank died."""
    known = worker_module.as_known(RuntimeError(f"[pair.cc:546] {how}. Check the logs of the remote worker"))
    assert type(known) is PicollmError and known.message == "another process of the stage is gone"
    assert how in (known.cause or "")


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("Error while creating shared memory segment /dev/shm/nccl-a (size 9637888), error: No space", "NCCL failed"),
        ("socketProgress: Connection closed by remote peer node-1", "another process of the stage is gone"),
    ],
)
def test_an_error_of_nccl_is_told_in_its_words(reason: str, message: str) -> None:
    known = worker_module.as_known(DistBackendError(f"{NCCL_ERROR}{reason}\nException raised from create"))
    assert type(known) is PicollmError and known.message.startswith(message)
    assert reason in (known.message.removeprefix("NCCL failed: "), known.cause)


# What torchrun says to a worker that it starts for the second time.
AGAIN = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("no"), 2), (IntegrityError("no"), 5), (Diverged("no"), 7), (OutOfMemory("no"), None), (None, None)],
)
def test_a_restart_after_an_error_that_comes_back_ends_at_once(
    stage: StageDir, error: PicollmError | None, code: int | None
) -> None:
    if error is not None:
        worker_module._report(stage, error, 1)
    before = read_all(stage.events_path)
    process = ended(stage, "assert 'torch' in sys.modules", **AGAIN)
    assert process.returncode == (code or 0), process.stderr
    assert (read_all(stage.events_path) == before) == (code is not None)
    assert (stage.log_dir / "error.json").exists() == (code is not None)  # the first report stays for the parent


def test_a_restart_after_a_stop_ends_at_once(stage: StageDir) -> None:
    stage.stop_path.touch()
    process = ended(stage, "raise AssertionError", **AGAIN)
    assert process.returncode == 0  # another code would make torchrun start it again
    assert stage.stop_path.exists() and not stage.events_path.exists()


def test_a_back_off_is_told_to_the_parent(stage: StageDir) -> None:
    error = OutOfMemory("out of memory with 8 rows at a time")
    error.backed_off = True
    worker_module._report(stage, error, 0)
    assert json.loads((stage.log_dir / "error.json").read_text())["backed_off"] is True


def test_a_worker_takes_one_argument() -> None:
    command = [sys.executable, "-c", STAGE.format(body="pass")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and "a worker takes one argument, its stage folder" in process.stderr


def test_only_rank_0_writes(stage: StageDir) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    other = Worker(stage, stage.read_config(), 1, 2)
    for number, handler in before.items():
        signal.signal(number, handler)
    other.start(total_steps=3)
    other.note("nothing")
    assert not stage.events_path.exists()
