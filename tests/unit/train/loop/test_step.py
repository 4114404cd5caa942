"""One step without a run around it: figures, agreement, accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from picollm.data.prefetch import StepBatches
from picollm.train.loop import Job
from picollm.train.step import StepResult, Trainer

MakeJob = Callable[..., Job]


def synthetic(rows: int, micro_batches: int, seed: int = 0) -> StepBatches:
    """Rows of random tokens, as a benchmark makes them."""
    ids = torch.randint(0, 50, (rows, 9), generator=torch.Generator().manual_seed(seed))
    pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids.chunk(micro_batches)]
    return StepBatches(pairs, rows * 8, {}, 0.0)


def norm_by_hand(trainer: Trainer, batches: StepBatches) -> tuple[float, float]:
    """(loss, gradient norm) with one pass over all rows; drops the gradients."""
    ids, targets = (torch.cat(parts) for parts in zip(*batches.micro_batches, strict=True))
    loss = trainer.model.loss(ids, targets, scale=1 / batches.count)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    trainer.optimizer.zero_grad()
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_micro_batches_add_up(make_job: MakeJob, dtype: str) -> None:
    trainer, batches = make_job(recipe={"dtype": dtype}).trainer, synthetic(8, 4)
    loss, norm = norm_by_hand(make_job(recipe={"dtype": "float64"}).trainer, batches)
    result = trainer.step(0, batches).read()
    tolerance = 1e-12 if dtype == "float64" else 1e-2
    assert result.loss == pytest.approx(loss, rel=tolerance)
    assert result.grad_norm == pytest.approx(norm, rel=tolerance)  # the loss scale is taken out
    assert result == StepResult(
        result.loss, result.grad_norm, stop=False, save=False, kept=True, bad_steps=0,
        loss_scale=1.0 if dtype == "float64" else 2.0**16, ended_at=result.ended_at,
    )  # fmt: skip


def test_wishes_come_back_with_the_figures(make_job: MakeJob) -> None:
    trainer = make_job().trainer
    first = trainer.step(0, synthetic(2, 1), stop=True)
    second = trainer.step(1, synthetic(2, 1), save=True)
    assert (first.read().stop, first.read().save) == (True, False)
    assert (second.read().stop, second.read().save) == (False, True)
    assert first.read().ended_at <= second.read().ended_at


def test_steps_train(make_job: MakeJob) -> None:
    trainer = make_job().trainer
    losses = [trainer.step(0, synthetic(4, 2)).read().loss for _ in range(8)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.1) and losses[-1] < losses[0] - 0.5


def test_at_the_floor_an_overflow_is_a_bad_step(make_job: MakeJob) -> None:
    trainer = make_job(recipe={"dtype": "float16"}).trainer
    assert trainer.loss_scale is not None
    trainer.loss_scale.restore({"scale": 1.0, "good_steps": 0})
    with torch.no_grad():  # hidden values near the largest float16, times gradients that are not small
        trainer.model.layers[0].mlp.up_proj.weight.fill_(12.0)
        trainer.model.lm_head.normal_(0, 400.0, generator=torch.Generator().manual_seed(0))
    result = trainer.step(0, synthetic(8, 1)).read()
    assert math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert (result.kept, result.bad_steps, result.loss_scale) == (False, 1, 1.0)


def test_evaluation_does_not_disturb_training(make_job: MakeJob) -> None:
    first, second = make_job().trainer, make_job().trainer
    second.model.eval()
    with torch.no_grad():
        second.model(torch.zeros(1, 4, dtype=torch.int64))
    second.model.train()
    assert first.step(0, synthetic(2, 1)).read().loss == second.step(0, synthetic(2, 1)).read().loss
