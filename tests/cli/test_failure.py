"""Why a stage failed, from the files that its processes left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from picollm.errors import ConfigError, HostError, OutOfMemory, PicollmError, WorkerError
from picollm.files import write_json
from picollm.run_dir import RunDir, StageDir
from picollm_cli.failure import explain

# As torch 2.13 prints it.
TORCHRUN_SUMMARY = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
picollm.stages.pretrain FAILED
------------------------------------------------------------
Failures:
[0]:
  time      : 2026-11-21_13:04:35
  host      : node-b
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 20903)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[1]:
  time      : 2026-11-21_13:04:35
  host      : node-b
  rank      : 5 (local_rank: 1)
  exitcode  : {code} (pid: 20902)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 20902
============================================================
"""
BUG = {"type": "PicollmError", "message": "another process of the stage is gone", "cause": None, "hint": None}


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    stage = RunDir(tmp_path / "runs" / "r").stage("pretrain")
    stage.log_dir.mkdir(parents=True)
    return stage


def error_of(stage: StageDir, *, report: Any = None, log: str = "", torchrun: str | None = None) -> PicollmError:
    if report:
        write_json(stage.log_dir / "error.json", {**report, "rank": 2})
    (stage.log_dir / "attempt_1.log").write_text(log)
    if torchrun:
        (stage.log_dir / "torchrun_error.json").write_text(json.dumps({"message": {"message": torchrun}}))
    return explain(
        stage,
        "pretrain",
        exit_code=1,
        log=stage.log_dir / "attempt_1.log",
        torchrun_errors=stage.log_dir / "torchrun_error.json",
    )


def test_an_error_of_ours_counts_most(stage: StageDir) -> None:
    report = {"type": "ConfigError", "message": "bad rate", "cause": "it is 0", "hint": None}
    error = error_of(stage, report=report, log=TORCHRUN_SUMMARY.format(code=-9), torchrun="ChildFailedError: x")
    assert isinstance(error, ConfigError)
    assert error.message == "bad rate" and "attempt_1.log" in str(error.hint)


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "killed by SIGKILL, which the system sends when memory"), (-7, "killed by SIGBUS, which")]
)
def test_a_killed_rank_counts_more_than_the_ranks_that_missed_it(stage: StageDir, code: int, said: str) -> None:
    error = error_of(stage, report=BUG, log="step 7\n" + TORCHRUN_SUMMARY.format(code=code))
    assert isinstance(error, WorkerError)
    assert str(error.cause).startswith(f"rank 5: {said}")


def test_a_bug_is_told_with_its_rank(stage: StageDir) -> None:
    error = error_of(stage, report=BUG, log="step 7\n" + TORCHRUN_SUMMARY.format(code=1))
    assert str(error.cause).startswith("rank 2: another process")


def test_the_last_lines_are_the_workers_and_not_torchruns(stage: StageDir) -> None:
    noise = 'Traceback (most recent call last):\n  File "torch/distributed/run.py", line 1\n'
    error = error_of(stage, log="W1121 warning\nstep 7\n" + noise + TORCHRUN_SUMMARY.format(code=-9))
    assert str(error.cause).splitlines()[-1].strip() == "step 7"


def test_nodes_that_do_not_meet_are_no_training_error(stage: StageDir) -> None:
    error = error_of(stage, log="waiting", torchrun="RendezvousTimeoutError: ")
    assert isinstance(error, HostError)
    assert error.cause == "RendezvousTimeoutError" and "node_rank" in str(error.hint)


def test_torchruns_own_trouble_is_told(stage: StageDir) -> None:
    error = error_of(stage, torchrun="OSError: [Errno 24]\nToo many open files")
    assert error.cause == "torchrun: OSError: [Errno 24] Too many open files"


@pytest.mark.parametrize(
    "last",
    ["MemoryError", "ImportError: libtorch_cpu.so: failed to map segment from shared object"],
)
def test_no_memory_to_load_torch_is_out_of_memory(stage: StageDir, last: str) -> None:
    error = error_of(stage, log=f"Traceback (most recent call last):\n  File x\n{last}\n")
    assert isinstance(error, OutOfMemory) and error.cause == last
    assert "ulimit -v" in str(error.hint) and "attempt_1.log" in str(error.hint)
    error = error_of(stage, log="MemoryError\nafter it, something else\n")
    assert not isinstance(error, OutOfMemory)


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"type": "HostError"}'])
def test_a_torn_report_is_none(stage: StageDir, torn: str) -> None:
    """A rank on a full disk creates the file and cannot fill it."""
    (stage.log_dir / "error.json").write_text(torn)
    error = error_of(stage, log="its last words\n")
    assert isinstance(error, WorkerError) and "its last words" in str(error.cause)
