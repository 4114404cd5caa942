"""A step on a GPU makes the host wait for nothing, and reads what a CPU reads.

Run with `JAXTYPING_DISABLE=1`: the checks of shapes cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from picollm.attention_choice import AttentionChoice
from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule, Source, TrainRecipe, TrainRuntime
from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.prefetch import Prefetcher
from picollm.data.token_source import Encoded, LiveTokens
from picollm.train.step import StepResult, Trainer, build_trainer

pytestmark = pytest.mark.gpu
LENGTH, ROWS, STEPS = 128, 8, 6
ARCH = Architecture(
    arch="portable", hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=128,
    intermediate_size=1024, vocab_size=512, max_position_embeddings=LENGTH, rope_theta=1e4,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.1)
SCHEDULE = Schedule(
    warmup_steps=0, warmdown_steps=2, final_lr_fraction=0.1, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip


def make(dtype: str, device: str, *, compile: bool = False) -> Trainer:
    recipe = TrainRecipe(
        stage="pretrain", seed=0, model=ARCH, dtype=dtype, dtype_reason="test", steps=STEPS,
        batch_tokens=ROWS * LENGTH, rates=RATES, schedule=SCHEDULE, data=(Source(dataset="d", sha256="0" * 64),),
        buffer_documents=4, tokenizer_sha256="1" * 64,
    )  # fmt: skip
    runtime = TrainRuntime(
        ranks=1, threads=1, device_batch_size=4, attention="auto", compile=compile, checkpoint_every=100, keep_last=2,
        eval_every=None, eval_tokens=8,
    )  # fmt: skip
    return build_trainer(recipe, runtime, AttentionChoice("sdpa", None, "test"), torch.device(device))


def prefetch(device: str) -> Prefetcher:
    def encode(indices: Sequence[int]) -> list[Encoded]:
        return [Encoded(np.random.default_rng(i).integers(1, 512, LENGTH).astype(np.int32)) for i in indices]

    documents = Mixture([LiveTokens(encode, 500)], [1.0], seed=0)
    packer = RowPacker(documents, length=LENGTH, bos=0, seed=0, buffer_size=4)
    return Prefetcher(
        Batches(packer, rows_per_step=ROWS, device_batch_size=4, rank=0, world=1), STEPS, torch.device(device)
    )


def take(trainer: Trainer, device: str, *, unwatched: int = STEPS) -> list[StepResult]:
    """All steps, then all results; after `unwatched` steps an operation that waits for the GPU is an error."""
    batches = prefetch(device)
    pending = []
    for number in range(STEPS):
        made = batches.next()
        if number == unwatched:
            torch.cuda.set_sync_debug_mode("error")
        pending.append(trainer.step(number, made))
    torch.cuda.set_sync_debug_mode("default")
    batches.close()
    return [step.read() for step in pending]


@pytest.fixture(autouse=True)
def sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_step_waits_for_the_device(dtype: str, compile: bool) -> None:
    results = take(make(dtype, "cuda", compile=compile), "cuda", unwatched=2)
    assert all(result.kept for result in results) or dtype == "float16"
    assert [result.ended_at for result in results] == sorted(result.ended_at for result in results)


def test_figures_are_those_of_a_cpu() -> None:
    for gpu, cpu in zip(take(make("float64", "cuda"), "cuda"), take(make("float64", "cpu"), "cpu"), strict=True):
        assert gpu.loss == pytest.approx(cpu.loss, rel=1e-8)
        assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-6)


def test_batches_are_pinned() -> None:
    batches = prefetch("cuda")
    assert all(tensor.is_pinned() for pair in batches.next().micro_batches for tensor in pair)
    batches.close()
