"""The loop, on a model of a few hundred weights: bad steps, stops, saves, events, and what resumes."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from picollm.data.prefetch import Prefetcher
from picollm.errors import ConfigError, Diverged, Interrupted, OutOfMemory
from picollm.files import read_json
from picollm.train import loop
from picollm.train.checkpoint_files import checkpoint_dir, read_meta, verify
from picollm.train.loop import Job, train
from picollm.train.step import MAX_BAD_STEPS

STEPS = 6

MakeJob = Callable[..., Job]


def weights(job: Job) -> list[Tensor]:
    """All but the row of the poisonous token."""
    return [
        p.detach()[:60] if name == "embed_tokens" else p.detach() for name, p in job.trainer.model.named_parameters()
    ]


def assert_same_weights(first: Job, second: Job) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


# -- steps that are not finite ----------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_noted(worker, make_worker, make_job: MakeJob) -> None:
    job = make_job({2, 4, 5})  # never three in a row
    result = train(worker, job)
    assert all(torch.isfinite(weight).all() for weight in weights(job))
    assert result["step"] == STEPS and math.isfinite(result["loss"]) and result["val"] == STEPS
    assert [note["text"].split(" was")[0] for note in worker.told("note")] == ["step 2", "step 4", "step 5"]
    assert [event["step"] for event in worker.told("step")] == list(range(1, STEPS + 1))
    assert [event["loss"] is None for event in worker.told("step")] == [False, True, False, True, True, False]
    verify(checkpoint_dir(worker.stage, STEPS))


def test_a_skipped_step_changes_neither_weights_nor_state(make_job: MakeJob) -> None:
    job = make_job({2})
    trainer, batches = job.trainer, Prefetcher(job.batches, 2, torch.device("cpu"))
    trainer.step(0, batches.next())
    before = [weight.clone() for weight in weights(job)]
    state = {shard.name: shard.tensor.clone() for shard in trainer.optimizer.shards()}
    result = trainer.step(1, batches.next()).read()
    assert not result.kept and result.bad_steps == 1 and math.isnan(result.loss)
    assert all(torch.equal(a, b) for a, b in zip(weights(job), before, strict=True))
    assert all(torch.equal(shard.tensor, state[shard.name]) for shard in trainer.optimizer.shards())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    batches.close()


def test_three_in_a_row_stop_the_run_and_save_the_last_good_state(worker, make_job: MakeJob) -> None:
    twin = make_job({3, 4, 5})
    batches = Prefetcher(twin.batches, 2, torch.device("cpu"))
    for number in range(2):
        twin.trainer.step(number, batches.next())
    batches.close()
    job = make_job({3, 4, 5})  # step 6 is launched before step 5 is read, and is a good one
    with pytest.raises(Diverged, match=f"{MAX_BAD_STEPS} steps in a row") as caught:
        train(worker, job)
    assert "train.matrix_lr" in str(caught.value.hint)
    assert_same_weights(job, twin)
    assert worker.stage.finished_steps() == [2]
    meta = read_meta(checkpoint_dir(worker.stage, 2))
    assert meta["step"] == 2 and math.isfinite(meta["loss"])
    # The next attempt goes on behind the bad batches.
    assert train(worker, make_job({3, 4, 5}))["step"] == STEPS


# -- float16 ----------------------------------------------------------------------------------------------------------


def test_float16_halves_its_loss_scale_until_nothing_overflows(worker, make_job: MakeJob) -> None:
    job = make_job(recipe={"dtype": "float16"})
    scale = job.trainer.loss_scale
    scale.restore({"scale": 2.0**18, "good_steps": 0})
    result = train(worker, job)
    overflows = worker.told("note")
    assert 1 <= len(overflows) < STEPS and all("overflowed under a loss scale" in e["text"] for e in overflows)
    assert scale.state() == {"scale": 2.0 ** (18 - len(overflows)), "good_steps": STEPS - len(overflows)}
    assert math.isfinite(result["loss"]) and all(torch.isfinite(weight).all() for weight in weights(job))
    # An overflow's loss is a good one: it is the gradient that was lost.
    assert all(event["loss"] is not None for event in worker.told("step"))


def test_more_overflows_than_bad_steps_are_forgiven(worker, make_job: MakeJob) -> None:
    job = make_job(recipe={"dtype": "float16"})
    job.trainer.loss_scale.restore({"scale": 2.0**20, "good_steps": 0})
    train(worker, job)
    assert len(worker.told("note")) > MAX_BAD_STEPS


def test_what_was_saved_between_bad_steps_is_good_enough(worker, make_job: MakeJob) -> None:
    """Nothing moved since the last good step: no older number is written over a newer one."""
    with pytest.raises(Diverged):
        train(worker, make_job({3, 4, 5}, runtime={"checkpoint_every": 4, "keep_last": 9}))
    assert worker.stage.finished_steps() == [4]
    again = make_job({3, 4, 5})
    assert train(worker, again)["step"] == STEPS
    assert [note["text"].split(" was")[0] for note in worker.told("note")] == [f"step {n}" for n in (3, 4, 5, 5)]


def test_a_loss_that_is_not_finite_is_no_overflow(worker, make_job: MakeJob) -> None:
    with pytest.raises(Diverged):
        train(worker, make_job({2, 3, 4}, recipe={"dtype": "float16"}))


def test_an_interrupted_float16_run_ends_with_the_same_weights(worker, make_worker, make_job: MakeJob) -> None:
    def job() -> Job:
        made = make_job(recipe={"dtype": "float16"})
        made.trainer.loss_scale.restore({"scale": 2.0**21, "good_steps": 0})
        return made

    whole, stopped = job(), job()
    train(make_worker("other"), whole)
    worker.stop_after = 3
    with pytest.raises(Interrupted):
        train(worker, stopped)
    again = make_job(recipe={"dtype": "float16"})
    train(worker, again)
    assert_same_weights(whole, again)
    assert whole.trainer.loss_scale.state() == again.trainer.loss_scale.state()


# -- stops and saves --------------------------------------------------------------------------------------------------


def test_a_stop_saves_and_the_next_attempt_ends_with_the_same_weights(worker, make_worker, make_job: MakeJob) -> None:
    whole = make_job()
    train(make_worker("other"), whole)
    worker.stop_after = 3  # asked for in step 3, read while step 4 runs
    with pytest.raises(Interrupted, match=f"step 4 of {STEPS}"):
        train(worker, make_job())
    assert worker.stage.finished_steps() == [4]
    again = make_job()
    assert train(worker, again)["step"] == STEPS
    assert_same_weights(again, whole)
    assert [(e["attempt"], e["resumed_from"]) for e in worker.told("stage_start")] == [(1, 0), (2, 4)]
    assert [event["step"] for event in worker.told("step")] == list(range(1, STEPS + 1))


def test_saves_come_by_steps_before_evaluations_and_at_the_end(worker, make_job: MakeJob) -> None:
    seen: list[tuple[int, list[int], bool]] = []
    job = make_job(runtime={"checkpoint_every": 2, "eval_every": 3, "keep_last": 9})

    def evaluate(step: int) -> dict[str, float]:
        seen.append((step, worker.stage.finished_steps(), job.trainer.model.training))
        return {"val": 1.0}

    job.evaluate = evaluate
    train(worker, job)
    assert seen == [(3, [2, 3], False), (6, [2, 3, 4, 6], False)]
    assert job.trainer.model.training
    assert [event["step"] for event in worker.told("checkpoint")] == [2, 3, 4, 6]
    assert [event["step"] for event in worker.told("eval")] == [3, 6]
    for event in worker.told("checkpoint"):
        assert (worker.stage.path / event["path"]).is_dir() and event["bytes"] > 0


def test_saves_come_by_the_clock(worker, make_job: MakeJob) -> None:
    job = make_job(runtime={"checkpoint_minutes": 5.0, "keep_last": 9})
    ticks = itertools.count()
    job.now = lambda: 120.0 * next(ticks)  # two minutes pass between any two looks
    train(worker, job)
    # Looks: 0 at the start, 1 and 2 before steps 1 and 2; the third is due, and seen while step 4 runs.
    assert worker.stage.finished_steps() == [4, 6]


def test_a_recipe_edited_by_hand_is_not_trained_on(worker, make_job: MakeJob) -> None:
    worker.stop_after = 1
    with pytest.raises(Interrupted):
        train(worker, make_job())
    before = verify(checkpoint_dir(worker.stage, 2))
    with pytest.raises(ConfigError, match="another recipe") as caught:
        train(worker, make_job(recipe={"seed": 1}))
    assert "--force pretrain" in str(caught.value.hint)
    assert verify(checkpoint_dir(worker.stage, 2)) == before and worker.stage.finished_steps() == [2]


# -- evaluations that are stopped -------------------------------------------------------------------------------------


def stopped_at(job: Job, step: int) -> list[int]:
    """Let the evaluation of a step end as one that all ranks were asked to stop; returns the steps of all of them."""
    seen: list[int] = []

    def evaluate(at: int) -> dict[str, float]:
        seen.append(at)
        if at == step:
            raise Interrupted("stopped while it evaluated")
        return {"val": float(at)}

    job.evaluate = evaluate
    return seen


def test_an_evaluation_that_was_stopped_is_obeyed_by_the_next_step(worker, make_worker, make_job: MakeJob) -> None:
    whole = make_job()
    train(make_worker("other"), whole)
    job = make_job(runtime={"eval_every": 2, "keep_last": 9})
    assert stopped_at(job, 2) == []
    with pytest.raises(Interrupted, match=f"stopped at step 3 of {STEPS}, state saved"):
        train(worker, job)
    assert worker.stage.finished_steps() == [2, 3] and not worker.told("eval")
    assert job.trainer.model.training
    again = make_job(runtime={"eval_every": 2})
    seen = stopped_at(again, 0)
    assert train(worker, again)["val"] == STEPS
    assert seen == [4, 6]
    assert_same_weights(whole, again)


def test_a_last_evaluation_that_was_stopped_is_made_on_resume(worker, make_job: MakeJob) -> None:
    job = make_job()
    seen = stopped_at(job, STEPS)
    with pytest.raises(Interrupted):
        train(worker, job)
    assert (seen, worker.stage.finished_steps(), worker.told("eval")) == ([STEPS], [STEPS], [])
    again = make_job()
    seen = stopped_at(again, 0)
    result = train(worker, again)
    assert seen == [STEPS] and result["val"] == STEPS
    assert result["loss"] == pytest.approx(worker.told("step")[-1]["loss"], abs=1e-6)
    assert_same_weights(job, again)
    assert [event["step"] for event in worker.told("step")] == list(range(1, STEPS + 1))
    assert [event["value"] for event in worker.told("eval")] == [STEPS]


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_gpu_saves_beside_training_where_the_machine_has_room(
    worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = loop._Loop(worker, make_job())
    assert here._can_copy() and not worker.told("note")
    monkeypatch.setattr(loop, "host_memory", lambda: (2**10, 2**10))
    assert not here._can_copy()
    assert "of this machine's 1.0 KiB" in worker.told("note")[0]["text"]


# -- beside the steps -------------------------------------------------------------------------------------------------


def test_an_error_in_the_data_ends_the_run_and_its_thread(worker, make_job: MakeJob) -> None:
    job = make_job()
    job.batches.packer.documents.draw = lambda: [][0]
    with pytest.raises(IndexError):
        train(worker, job)


def test_out_of_memory_in_the_first_steps_asks_for_half(
    worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(runtime={"device_batch_size": 4})
    limit = torch.iinfo(torch.int64).max // 8
    monkeypatch.setattr(job.trainer.model, "loss", lambda *a, **k: torch.empty(limit))  # really asks for it
    with pytest.raises(OutOfMemory, match="4 rows at a time") as caught:
        train(worker, job)
    assert caught.value.backed_off
    assert read_json(worker.stage.runtime_path)["device_batch_size"] == 2
    # Later it is told as it is.
    worker.stage.runtime_path.unlink()
    monkeypatch.setattr(loop, "FIRST_STEPS", 0)
    with pytest.raises(RuntimeError, match="allocate memory"):
        train(worker, job)
    assert not worker.stage.runtime_path.exists()


def test_the_first_step_of_a_compiled_run_is_a_phase(worker, make_job: MakeJob) -> None:
    train(worker, make_job(runtime={"compile": True}))
    assert [event["text"] for event in worker.told("phase")] == ["compiling…", ""]
    kinds = [event["kind"] for event in (*worker.told("phase"), *worker.told("step")[:1])]
    assert kinds == ["phase", "phase", "step"]


def test_garbage_is_frozen_while_steps_run(worker, make_job: MakeJob) -> None:
    job = make_job(runtime={"eval_every": 3})
    enabled: list[bool] = []

    def evaluate(step: int) -> dict[str, float]:
        enabled.append(gc.isenabled())
        return {}

    job.evaluate = evaluate
    train(worker, job)
    assert enabled == [False, True] and gc.isenabled() and gc.get_freeze_count() == 0
