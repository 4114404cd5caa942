"""The loop, on a model of a few hundred weights: what it does with steps that are not finite, and with a stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule, Source, TrainRecipe, TrainRuntime
from picollm.data.packing import Batches, Encoded, RowPacker
from picollm.errors import ConfigError, Interrupted, WorkerError
from picollm.events import EventWriter, read_all
from picollm.run_dir import StageDir, run_named
from picollm.train.checkpoint_files import checkpoint_dir, read_meta, verify
from picollm.train.loop import MAX_BAD_STEPS, Job, build_model, train
from picollm.worker import Worker

STEPS = 6
ARCH = Architecture(
    arch="portable", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=16, vocab_size=32, max_position_embeddings=8, rope_theta=1e4,
)  # fmt: skip
RECIPE = TrainRecipe(
    stage="pretrain", seed=0, model=ARCH, dtype="float32", dtype_reason="test", steps=STEPS, batch_tokens=16,
    rates=Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.0),
    schedule=Schedule(
        warmup_steps=0, warmdown_steps=2, final_lr_fraction=0.1, momentum_start=0.85, momentum_peak=0.95,
        momentum_end=0.9, momentum_ramp_steps=3,
    ),
    data=(Source(dataset="d", sha256="0" * 64),), buffer_documents=4, tokenizer_sha256="1" * 64,
)  # fmt: skip
RUNTIME = TrainRuntime(
    ranks=1, threads=1, device_batch_size=2, attention="auto", compile=False, checkpoint_every=100, keep_last=2,
    eval_every=None, eval_tokens=8,
)  # fmt: skip


class QuietWorker(Worker):
    """A worker without a process around it: no signals, no launcher; stops when told."""

    def __init__(self, stage: StageDir) -> None:
        self.stage, self.rank, self.world = stage, 0, 1
        self.events: EventWriter = EventWriter(stage.events_path, stage.name)
        self.stop_after: int | None = None
        self.looks = 0

    def should_stop(self) -> bool:
        self.looks += 1
        return self.looks == self.stop_after


@pytest.fixture
def worker(clean_environment: Path) -> Iterator[QuietWorker]:
    worker = QuietWorker(run_named("r").stage("pretrain"))
    yield worker
    worker.events.close()


def encode(indices: Sequence[int]) -> list[Encoded]:
    return [Encoded(np.arange(1 + i % 5, 9 + i % 5, dtype=np.int32)) for i in indices]


def make_job() -> Job:
    model, optimizer = build_model(RECIPE, "matmul", torch.device("cpu"))
    packer = RowPacker(encode, 50, length=8, bos=0, seed=0, buffer_size=4, cut=True)
    batches = Batches(packer, rows_per_step=2, device_batch_size=2, rank=0, world=1)
    return Job(RECIPE, RUNTIME, model, optimizer, batches, lambda step: {"val": float(step)}, torch.device("cpu"))


def weights(job: Job) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in job.model.parameters()]


def break_loss(job: Job, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps (counted from 1) not a number, gradient and all."""
    real: Callable[..., Tensor] = job.model.loss
    calls = 0

    def loss(*args: Tensor, scale: float = 1.0) -> Tensor:
        nonlocal calls
        calls += 1
        return real(*args, scale=scale) * (math.nan if calls in steps else 1.0)

    monkeypatch.setattr(job.model, "loss", loss)


def test_a_step_that_is_not_finite_is_skipped_and_noted(worker: QuietWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    break_loss(job, monkeypatch, {2, 4, 5})  # never three in a row
    updated: list[int] = []
    real = job.optimizer.step

    def step(number: int) -> None:
        updated.append(number + 1)
        real(number)

    monkeypatch.setattr(job.optimizer, "step", step)
    result = train(worker, job)
    assert updated == [1, 3, 6]
    assert all(torch.isfinite(weight).all() for weight in weights(job))
    assert result["step"] == STEPS and math.isfinite(result["loss"]) and result["val"] == STEPS
    events = read_all(worker.stage.events_path)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert [note.split(" was")[0] for note in notes] == ["step 2", "step 4", "step 5"]
    assert [event["loss"] is None for event in events if event["kind"] == "step"] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    verify(checkpoint_dir(worker.stage, STEPS))


def test_three_in_a_row_stop_the_run_and_save_the_last_good_state(
    worker: QuietWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = make_job()
    for number in range(2):
        [(ids, targets)], count = twin.batches.next_step()
        twin.model.loss(torch.from_numpy(ids), torch.from_numpy(targets), scale=1 / count).backward()
        twin.optimizer.step(number)
    job = make_job()
    break_loss(job, monkeypatch, {3, 4, 5})
    with pytest.raises(WorkerError, match=f"{MAX_BAD_STEPS} steps in a row") as caught:
        train(worker, job)
    assert "train.matrix_lr" in str(caught.value.hint)
    assert worker.stage.finished_steps() == [2]
    meta = read_meta(checkpoint_dir(worker.stage, 2))
    assert meta["step"] == 2 and math.isfinite(meta["loss"])
    for found, wanted in zip(weights(job), weights(twin), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_stop_saves_and_the_next_attempt_ends_with_the_same_weights(worker: QuietWorker) -> None:
    whole = make_job()
    expected_worker = QuietWorker(run_named("other").stage("pretrain"))
    train(expected_worker, whole)
    expected_worker.events.close()
    worker.stop_after = 4
    with pytest.raises(Interrupted, match=f"step 4 of {STEPS}"):
        train(worker, make_job())
    assert worker.stage.finished_steps() == [4]
    again = make_job()
    assert train(worker, again)["step"] == STEPS
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    starts = [event for event in read_all(worker.stage.events_path) if event["kind"] == "stage_start"]
    assert [(event["attempt"], event["resumed_from"]) for event in starts] == [(1, 0), (2, 4)]


def test_a_recipe_edited_by_hand_is_not_trained_on(worker: QuietWorker) -> None:
    worker.stop_after = 2
    with pytest.raises(Interrupted):
        train(worker, make_job())
    edited = make_job()
    edited.recipe = RECIPE.model_copy(update={"seed": 1})
    before = verify(checkpoint_dir(worker.stage, 2))
    with pytest.raises(ConfigError, match="another recipe") as caught:
        train(worker, edited)
    assert "--force pretrain" in str(caught.value.hint)
    assert verify(checkpoint_dir(worker.stage, 2)) == before and worker.stage.finished_steps() == [2]
