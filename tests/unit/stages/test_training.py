"""A training worker refuses inputs that are not the ones its recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.errors import ConfigError, IntegrityError
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
        run_training(worker, inputs, encode=list, num_documents=1, cut=True, evaluate=lambda model, step: {})
    assert caught.value.hint == f"use a multiple of {8 * world}"
