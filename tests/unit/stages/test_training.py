"""A training worker refuses inputs that are not the ones its recipe names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.errors import ConfigError, IntegrityError
from picollm.events import read_all
from picollm.files import read_json, write_json
from picollm.run_dir import run_named
from picollm.stages.training import read_inputs, require_same, run_training
from picollm.tokenizer.tokenizer import Tokenizer

RECIPE: dict[str, Any] = {
    "stage": "pretrain", "seed": 0, "dtype": "float32", "dtype_reason": "test", "steps": 2, "batch_tokens": 16,
    "model": {
        "arch": "portable", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "vocab_size": 512,
        "max_position_embeddings": 8, "rope_theta": 1e4,
    },
    "rates": {
        "matrix_lr": 0.02, "embedding_lr": 0.05, "unembedding_lr": 0.004, "scalar_lr": 0.005, "weight_decay": 0.0,
    },
    "schedule": {
        "warmup_steps": 0, "warmdown_steps": 1, "final_lr_fraction": 0.1, "momentum_start": 0.85,
        "momentum_peak": 0.95, "momentum_end": 0.9, "momentum_ramp_steps": 1,
    },
    "buffer_documents": 4,
}  # fmt: skip
RUNTIME = {
    "ranks": 1, "threads": 1, "device_batch_size": 2, "attention": "auto", "compile": False, "checkpoint_every": 10,
    "keep_last": 1, "eval_every": None, "eval_tokens": 8,
}  # fmt: skip

MakeWorker = Callable[..., Any]


@pytest.fixture
def make_worker(clean_environment: Path, tokenizer: Tokenizer) -> MakeWorker:
    """A worker's view of a run with a tokenizer and a dataset `words`; arguments change its recipe."""
    with DatasetWriter("words") as writer:
        writer.start("text")
        writer.add("train", "some words")
        writer.add("validation", "other words")
        writer.publish({"from": "a test"})
    run = run_named("r")
    tokenizer.save(run.tokenizer)
    data = [{"dataset": "words", "sha256": Dataset.open("words").sha256}]

    def make(**changed: Any) -> Any:
        recipe = {**RECIPE, "data": data, "tokenizer_sha256": tokenizer.sha256, **changed}
        return SimpleNamespace(stage=run.stage("pretrain"), config={"recipe": recipe, "runtime": RUNTIME}, world=1)

    return make


def test_inputs_are_opened(make_worker: MakeWorker, tokenizer: Tokenizer) -> None:
    inputs = read_inputs(make_worker())
    assert inputs.tokenizer.sha256 == tokenizer.sha256
    assert [dataset.name for dataset in inputs.datasets] == ["words"]
    assert (inputs.recipe.steps, inputs.runtime.keep_last) == (2, 1)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"tokenizer_sha256": "0" * 64}, "the tokenizer is not the one"),
        ({"data": [{"dataset": "words", "sha256": "0" * 64}]}, "the dataset `words` is not the one"),
    ],
)
def test_other_inputs_are_refused_with_both_hashes(
    make_worker: MakeWorker, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(IntegrityError, match=named) as caught:
        read_inputs(make_worker(**changed))
    assert "the recipe names 000000000000…" in str(caught.value.cause)


def test_a_recipe_of_another_schema_is_refused(make_worker: MakeWorker) -> None:
    with pytest.raises(ConfigError, match="is not a training config"):
        read_inputs(make_worker(unknown=1))


def test_equal_hashes_pass(make_worker: MakeWorker) -> None:
    require_same(make_worker(), "model", "a" * 64, "a" * 64)


@pytest.mark.parametrize(("batch_tokens", "world"), [(12, 1), (8, 2), (24, 2)])
def test_a_batch_is_whole_rows_for_every_rank(make_worker: MakeWorker, batch_tokens: int, world: int) -> None:
    worker = make_worker(batch_tokens=batch_tokens)
    inputs = read_inputs(worker)
    worker.world = world
    with pytest.raises(ConfigError, match="whole number of rows") as caught:
        run_training(worker, inputs, sources=[], weights=[], evaluate=lambda model, step: {})
    assert caught.value.hint == f"use a multiple of {8 * world}"


def test_a_back_off_is_laid_over_the_runtime(make_worker: MakeWorker) -> None:
    worker = make_worker()
    write_json(worker.stage.config_path, {"schema": 1, "stage": "pretrain", **worker.config})
    write_json(worker.stage.runtime_path, {"device_batch_size": 1, "reason": "out of memory with 2 rows at a time"})
    worker.config = worker.stage.read_config()
    inputs = read_inputs(worker)
    assert inputs.runtime.device_batch_size == 1 and inputs.runtime.keep_last == 1
    assert inputs.smaller_because == "out of memory with 2 rows at a time"


@pytest.mark.parametrize("changed", [{"device_batch_size": 0}, {"device_batch_size": "many"}, {"nonsense": 1}])
def test_a_hostile_back_off_is_named_with_its_file(make_worker: MakeWorker, changed: dict[str, Any]) -> None:
    worker = make_worker()
    write_json(worker.stage.config_path, {"schema": 1, "stage": "pretrain", **worker.config})
    write_json(worker.stage.runtime_path, changed)
    worker.config = worker.stage.read_config()
    with pytest.raises(ConfigError, match=r"runtime\.json` changes the runtime to what cannot be") as caught:
        read_inputs(worker)
    assert next(iter(changed)) in str(caught.value.cause) and "remove it" in str(caught.value.hint)


# The stage under a limit of the address space, so many MiB above what it needs before it trains.
LIMITED = """
import resource, sys
import numpy, torch, psutil
from picollm.stages import pretrain
from picollm.worker import run
limit = psutil.Process().memory_info().vms + (int(sys.argv.pop()) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
run(pretrain.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_stage_that_does_not_fit_gets_there_in_smaller_steps(make_worker: MakeWorker) -> None:
    """Really out of memory: a row takes about 30 MiB, all of them more than there is."""
    length, rows = 512, 32
    model = {**RECIPE["model"], "hidden_size": 128, "head_dim": 64, "num_hidden_layers": 2, "intermediate_size": 512}
    worker = make_worker(model=model | {"max_position_embeddings": length}, batch_tokens=length * rows)
    worker.config["runtime"] = RUNTIME | {"device_batch_size": rows}
    stage = worker.stage
    write_json(stage.config_path, {"schema": 1, "stage": "pretrain", **worker.config})
    asked = [rows]
    for _ in range(5):
        command = [sys.executable, "-c", LIMITED, stage.path, "700"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if process.returncode == 0:
            break
        report = read_json(stage.log_dir / "error.json")
        assert (process.returncode, report["type"], report["backed_off"]) == (7, "OutOfMemory", True), process.stderr
        asked.append(read_json(stage.runtime_path)["device_batch_size"])
    assert stage.record() is not None
    assert 1 < len(asked) == 1 + [32, 16, 8, 4, 2, 1].index(asked[-1])
    events = read_all(stage.events_path)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert f"{asked[-1]} rows at a time: out of memory with {asked[-2]} rows at a time" in notes
    assert {event["tokens"] for event in events if event["kind"] == "step"} == {16384, 32768}
