"""What a worker leaves when memory ran out: half of the rows for the next attempt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from picollm.errors import HostError, OutOfMemory
from picollm.files import read_json, write_json
from picollm.run_dir import StageDir, run_named
from picollm.train.back_off import smaller_batch


@pytest.fixture
def stage(clean_environment: Path) -> Iterator[StageDir]:
    stage = run_named("r").stage("pretrain")
    write_json(stage.config_path, {"schema": 1, "recipe": {}, "runtime": {"device_batch_size": 8, "threads": 2}})
    yield stage


def test_half_of_the_rows_are_asked_for(stage: StageDir) -> None:
    smaller = smaller_batch(stage, 8, MemoryError("no room"))
    assert isinstance(smaller, OutOfMemory) and smaller.backed_off and smaller.to_dict()["backed_off"] is True
    assert (smaller.message, smaller.cause) == ("out of memory with 8 rows at a time", "no room")
    assert stage.read_config()["runtime"] == {"device_batch_size": 4, "threads": 2, "reason": smaller.message}


def test_what_else_the_file_says_is_kept(stage: StageDir) -> None:
    write_json(stage.runtime_path, {"threads": 1, "device_batch_size": 5, "reason": "before"})
    smaller_batch(stage, 5, MemoryError())
    assert read_json(stage.runtime_path) == {
        "threads": 1, "device_batch_size": 2, "reason": "out of memory with 5 rows at a time",
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "error"), [(1, MemoryError()), (8, ValueError("other")), (8, HostError("disk"))])
def test_otherwise_nothing_changes(stage: StageDir, rows: int, error: Exception) -> None:
    assert smaller_batch(stage, rows, error) is None
    assert not stage.runtime_path.exists()
