"""A model of a few hundred weights on rows of eight tokens, and a worker without a process around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picollm.attention_choice import AttentionChoice
from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule, Source, TrainRecipe, TrainRuntime
from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.token_source import Encoded, LiveTokens
from picollm.events import Event, EventWriter, read_all
from picollm.run_dir import StageDir, run_named
from picollm.train.loop import Job
from picollm.train.step import build_trainer
from picollm.worker import Worker

STEPS, ROWS, LENGTH, DOCUMENTS = 6, 2, 8, 500
POISON = 60  # a token that no document has unless a test puts it there
ARCH = Architecture(
    arch="portable", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=16, vocab_size=64, max_position_embeddings=LENGTH, rope_theta=1e4,
)  # fmt: skip
RECIPE = TrainRecipe(
    stage="pretrain", seed=0, model=ARCH, dtype="float32", dtype_reason="test", steps=STEPS,
    batch_tokens=ROWS * LENGTH,
    rates=Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.0),
    schedule=Schedule(
        warmup_steps=0, warmdown_steps=2, final_lr_fraction=0.1, momentum_start=0.85, momentum_peak=0.95,
        momentum_end=0.9, momentum_ramp_steps=3,
    ),
    data=(Source(dataset="d", sha256="0" * 64),), buffer_documents=4, tokenizer_sha256="1" * 64,
)  # fmt: skip
RUNTIME = TrainRuntime(
    ranks=1, threads=1, device_batch_size=1, attention="auto", compile=False, checkpoint_every=100, keep_last=2,
    eval_every=None, eval_tokens=8,
)  # fmt: skip


class QuietWorker(Worker):
    """No signals and no launcher; stops when told."""

    def __init__(self, stage: StageDir) -> None:
        self.stage, self.rank, self.world = stage, 0, 1
        self.events: EventWriter = EventWriter(stage.events_path, stage.name)
        self.stop_after: int | None = None
        self.looks = 0

    def should_stop(self) -> bool:
        self.looks += 1
        return self.looks == self.stop_after

    def told(self, kind: str) -> list[Event]:
        return [event for event in read_all(self.stage.events_path) if event["kind"] == kind]


@pytest.fixture
def make_worker(clean_environment: Path) -> Iterator[Callable[..., QuietWorker]]:
    """Makes a worker on the `pretrain` stage of a run."""
    made: list[QuietWorker] = []

    def make(run: str = "r") -> QuietWorker:
        made.append(QuietWorker(run_named(run).stage("pretrain")))
        return made[-1]

    yield make
    for worker in made:
        worker.events.close()


@pytest.fixture
def worker(make_worker: Callable[..., QuietWorker]) -> QuietWorker:
    return make_worker()


def _packer(poisoned: frozenset[int]) -> RowPacker:
    """One document a row, which begins with the document's number, and holds POISON where it is poisoned."""

    def encode(indices: Sequence[int]) -> list[Encoded]:
        encoded = []
        for i in indices:
            ids = np.full(LENGTH, 1 + i % 50, dtype=np.int32)
            ids[1] = 1 + i // 50
            ids[3] = POISON if i in poisoned else ids[0]
            encoded.append(Encoded(ids))
        return encoded

    documents = Mixture([LiveTokens(encode, DOCUMENTS)], [1.0], seed=0)
    return RowPacker(documents, length=LENGTH, bos=0, seed=0, buffer_size=4)


def _documents_of(steps: set[int]) -> frozenset[int]:
    """The documents that make the rows of these steps, counted from 1."""
    packer = _packer(frozenset())
    rows = [packer.next_row()[0] for _ in range(STEPS * ROWS)]
    documents = [int(row[1] - 1 + 50 * (row[2] - 1)) for row in rows]
    return frozenset(documents[at] for step in steps for at in range((step - 1) * ROWS, step * ROWS))


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    """Batches of the small recipe; those of `poisoned` steps hold the token POISON."""

    def make(poisoned: set[int] | None = None) -> Batches:
        packer = _packer(_documents_of(poisoned or set()))
        return Batches(packer, rows_per_step=ROWS, device_batch_size=1, rank=0, world=1)

    return make


@pytest.fixture
def make_job(make_batches: Callable[..., Batches]) -> Callable[..., Job]:
    """A job on the small recipe.

    `poisoned` are steps, counted from 1, whose batches hold a token with an infinite embedding: loss and gradients
    of these steps are really not finite. `recipe` and `runtime` change fields.
    """

    def make(
        poisoned: set[int] | None = None, recipe: dict[str, Any] | None = None, runtime: dict[str, Any] | None = None
    ) -> Job:
        chosen = RECIPE.model_copy(update=recipe or {})
        how = RUNTIME.model_copy(update=runtime or {})
        trainer = build_trainer(chosen, RUNTIME, AttentionChoice("matmul", None, "test"), torch.device("cpu"))
        if poisoned is not None:
            with torch.no_grad():
                trainer.model.embed_tokens[POISON] = float("inf")
        return Job(chosen, how, trainer, make_batches(poisoned), lambda step: {"val": float(step)})

    return make
