"""The one training loop: pretraining and SFT differ in where batches come from and what is evaluated.

The host runs one step ahead of what it knows: while step n + 1 runs, it reads what step n said, writes its event, and
obeys it (stop, save, give up). Before a save, and so before every evaluation, it catches up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.data.packing import Batches
from picollm.data.prefetch import Prefetcher, StepBatches
from picollm.errors import ConfigError, Diverged, HostError, Interrupted, WorkerError
from picollm.files import sha256_json
from picollm.hardware import host_memory
from picollm.memory import copies_bytes, copies_fit
from picollm.scaling import flops_per_token
from picollm.train import checkpoint, distributed
from picollm.train.back_off import FIRST_STEPS, smaller_batch
from picollm.train.checkpoint_files import checkpoint_dir
from picollm.train.garbage import frozen_garbage
from picollm.train.metrics import Throughput, memory, peak_flops
from picollm.train.step import MAX_BAD_STEPS, Pending, StepResult, Trainer
from picollm.units import size
from picollm.worker import Worker

# How long a rank that fails waits for the save in flight.
LAST_SAVE_S = 15.0
# step -> values to record, by name; a job of all ranks, which Interrupted ends on all alike
Evaluate = Callable[[int], dict[str, float]]


@dataclass
class Job:
    """One stage's training: everything that differs between stages, assembled by the stage."""

    recipe: TrainRecipe
    runtime: TrainRuntime
    trainer: Trainer
    batches: Batches
    evaluate: Evaluate
    now: Callable[[], float] = time.monotonic  # of `checkpoint_minutes`


def train(worker: Worker, job: Job) -> dict[str, Any]:
    """Run the job from its last checkpoint to its end; returns the figures for the stage record.

    Raises:
        Interrupted: a stop was asked for; the state is saved.
        Diverged: several steps in a row were not finite; the last good state is saved.
        OutOfMemory: in one of the first steps; the next attempt takes fewer rows at a time.
        IntegrityError: there are checkpoints and none is intact.
        ConfigError: the newest checkpoint was made with another recipe.
    """
    loop = _Loop(worker, job)
    try:
        prefetcher = Prefetcher(job.batches, loop.steps - loop.step, job.trainer.device)
        with contextlib.closing(prefetcher), frozen_garbage() as collect:
            while loop.step < loop.steps:
                loop.take(prefetcher)
                collect()
        return loop.finish()
    except BaseException:
        with contextlib.suppress(Exception):
            # Other ranks may be gone, and a save needs all of them.
            loop.saver.wait(None if worker.world == 1 else LAST_SAVE_S)
        raise


@dataclass(frozen=True)
class Launched:
    """A step whose figures nobody has read yet; `position` of the data is the one behind it, `step` counts from 1."""

    step: int
    position: dict[str, Any]
    figures: Pending


class _Loop:
    """The state of a run between two steps.

    Attributes:
        step, steps: how many were launched, earlier attempts included, and how many there will be.
    """

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker, self.job, self.trainer = worker, job, job.trainer
        self.stage, self.recipe, self.runtime = worker.stage, job.recipe, job.runtime
        self.recipe_sha256 = sha256_json(self.recipe.model_dump(mode="json"))
        device = self.trainer.device
        self.saver = checkpoint.Saver(
            self.stage,
            worker.rank,
            worker.world,
            keep_last=self.runtime.keep_last,
            asynchronous=device.type == "cuda" and self._can_copy(),
            warn=lambda text: worker.note(text, level="warning"),
            stopped=worker.should_stop,
        )
        step_flops = self.recipe.batch_tokens * flops_per_token(self.recipe.model)
        self.throughput = Throughput(
            self.recipe.batch_tokens, step_flops, peak_flops(device, self.recipe.dtype), worker.world
        )
        self.step, self.steps = 0, self.recipe.steps
        self.loss: float | None = None  # of the last step that was kept
        self.values: dict[str, float] = {}  # of the last evaluation
        self.pending: Launched | None = None
        self.stopping = self.saving = False  # what the ranks agreed on
        self.saved_step, self.cpu_before = -1, 0.0
        self._resume()
        self.first = self.step  # of this attempt
        self.epoch = job.batches.packer.epoch
        self.saved_at = job.now()
        self.clock = time.monotonic()  # end of the step that was read last, or of a save or evaluation after it

    def _can_copy(self) -> bool:
        """Whether the machine's own memory has room for copies of what its ranks save; says so where it has not."""
        arch, here = self.recipe.model, distributed.ranks_here()
        needed = copies_bytes(arch, self.recipe.dtype, ranks=self.worker.world, ranks_per_node=here)
        if copies_fit(needed, there := host_memory()[0]):
            return True
        why = f"copies would take {size(needed)} of this machine's {size(there)}"
        self.worker.note(f"training waits while it saves: {why}")
        return False

    def _resume(self) -> None:
        meta, warnings = checkpoint.resume(
            self.stage, self.trainer.model, self.trainer.optimizer, tokenizer_sha256=self.recipe.tokenizer_sha256
        )
        if meta is not None:
            found, wanted = meta["recipe_sha256"], self.recipe_sha256
            if found != wanted:
                raise ConfigError(
                    f"the checkpoint of step {meta['step']} was made with another recipe than "
                    f"`{self.stage.config_path}` has",
                    cause=f"its recipe's sha256 is {found[:12]}…, the one there {wanted[:12]}…",
                    hint=f"undo the edit, or redo the stage with `picollm speedrun --run {self.stage.run.name} "
                    f"--force {self.stage.name}`",
                )
            self.step = self.saved_step = meta["step"]
            self.loss, self.cpu_before = meta["loss"], meta["cpu_s"]
            self.job.batches.packer.restore(meta["data"])
            if self.trainer.loss_scale is not None:
                self.trainer.loss_scale.restore(meta["loss_scale"])
        self.worker.start(resumed_from=self.step, total_steps=self.steps)
        for text in warnings:
            self.worker.note(text, level="warning")

    # -- one step --

    def take(self, prefetcher: Prefetcher) -> None:
        """Launch a step, read the one before it, then save, stop or evaluate where it is time to."""
        with self._out_of_memory_backs_off():
            self._take(prefetcher.next())

    def _take(self, batches: StepBatches) -> None:
        with self._compiling():
            pending = self.trainer.step(self.step, batches, stop=self.worker.should_stop(), save=self._save_is_due())
            self._read()
            self.step, self.epoch = self.step + 1, batches.epoch
            self.pending = Launched(self.step, batches.position, pending)
        done, last, every = self.step, self.step == self.steps, self.runtime.eval_every
        evaluating = every is not None and done % every == 0 and not last
        if done % self.runtime.checkpoint_every == 0 or evaluating or last or self.stopping or self.saving:
            self._read()
            self._save(done, batches.position)
        if self.stopping and not last:
            self._wait_until_saved()
            raise Interrupted(f"stopped at step {done} of {self.steps}, state saved")
        if evaluating:
            with contextlib.suppress(HostError, WorkerError):  # told already; the next save tries again
                self.saver.wait()
            self._evaluate(done)
        self._tell_saved()

    @contextlib.contextmanager
    def _out_of_memory_backs_off(self) -> Iterator[None]:
        early = self.step - self.first < FIRST_STEPS
        try:
            yield
        except Exception as error:
            smaller = smaller_batch(self.stage, self.runtime.device_batch_size, error) if early else None
            if smaller is None:
                raise
            raise smaller from error

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Say so around the first step of an attempt: it takes minutes where the others take less than a second."""
        if self.step > self.first or not self.runtime.compile:
            yield
            return
        self.worker.event("phase", text="compiling…")
        yield
        self._read()
        self.worker.event("phase", text="")

    def _save_is_due(self) -> bool:
        """True on rank 0 when its clock says so."""
        minutes = self.runtime.checkpoint_minutes
        return self.worker.rank == 0 and minutes is not None and self.job.now() - self.saved_at >= 60 * minutes

    def _read(self) -> None:
        """Take in what the step launched last has said, once it has ended; nothing to do when that was done.

        Raises:
            Diverged: it was the last of too many that were not finite.
        """
        if self.pending is None:
            return
        launched, self.pending = self.pending, None
        result = launched.figures.read()
        self.stopping |= result.stop
        self.saving |= result.save
        if result.kept:
            self.loss = result.loss
        else:
            self._note_skipped(launched.step, result)
        dt_s = max(1e-9, result.ended_at - self.clock)
        self.clock = result.ended_at
        mfu = self.throughput.mfu(dt_s)
        self.worker.event(
            "step",
            step=launched.step,
            loss=round(result.loss, 6),
            lr=round(self.trainer.optimizer.rates_at(launched.step - 1)["matrix"], 8),
            tokens=launched.step * self.recipe.batch_tokens,
            tokens_per_s=round(self.throughput.tokens_per_s(dt_s), 1),
            mfu=None if mfu is None else round(mfu, 4),
            grad_norm=round(result.grad_norm, 6),
            mem_gib=round(memory(self.trainer.device).allocated_gib, 3),
            dt_s=round(dt_s, 4),
        )
        if result.bad_steps == MAX_BAD_STEPS:
            # The position is the one behind the bad steps: the next attempt goes on with other batches.
            self._save(launched.step - MAX_BAD_STEPS, launched.position)
            self._wait_until_saved()
            raise Diverged(
                f"{MAX_BAD_STEPS} steps in a row were not finite",
                cause=f"the last loss was {result.loss}, the last gradient norm {result.grad_norm}",
                hint="lower the rates (`--set train.matrix_lr=…`) in a new run; the last good state is saved",
            )

    def _note_skipped(self, step: int, result: StepResult) -> None:
        if result.bad_steps:
            text = f"step {step} was not finite (loss {result.loss}, gradient norm {result.grad_norm}); skipped"
            self.worker.note(text, level="warning")
        else:
            self.worker.note(f"step {step} overflowed under a loss scale of {result.loss_scale:,.0f}; skipped, halved")

    # -- between steps --

    def _save(self, step: int, position: dict[str, Any]) -> None:
        if step > self.saved_step:  # what was saved after the last good step holds the same weights
            self.saved_step = step
            meta = {
                "recipe_sha256": self.recipe_sha256,
                "tokenizer_sha256": self.recipe.tokenizer_sha256,
                "data": position,
                "loss": self.loss,
                "cpu_s": round(self.cpu_before + time.process_time(), 3),
            }
            if self.trainer.loss_scale is not None:
                meta["loss_scale"] = self.trainer.loss_scale.state()
            self.saver.save(step, self.trainer.model, self.trainer.optimizer, meta)
        self.saving, self.saved_at, self.clock = False, self.job.now(), time.monotonic()

    def _tell_saved(self) -> None:
        for saved in self.saver.finished():
            path = saved.path.relative_to(self.stage.path).as_posix()
            self.worker.event("checkpoint", step=saved.step, path=path, bytes=saved.bytes, dt_s=saved.dt_s)

    def _wait_until_saved(self) -> None:
        self.saver.wait()
        self._tell_saved()

    def _evaluate(self, step: int) -> None:
        """All ranks evaluate, rank 0 tells. Where they stopped it half-way, the next step sees that all is saved.

        Raises:
            Interrupted: they stopped the last one, which no step follows; the next attempt makes it.
        """
        self.trainer.model.eval()
        try:
            self.values = self.job.evaluate(step)
        except Interrupted:
            if step == self.steps:
                raise
            self.stopping = True
        else:
            for name, value in self.values.items():
                self.worker.event("eval", step=step, name=name, value=value)
        self.trainer.model.train()
        self.clock = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Evaluate what came out, once it is safe; returns the figures for the stage record."""
        self._wait_until_saved()
        self._evaluate(self.steps)
        return {
            "step": self.steps,
            "loss": self.loss,
            "tokens": self.steps * self.recipe.batch_tokens,
            "epochs": round(self.epoch, 3),
            "cpu_s": round(self.cpu_before + time.process_time(), 1),
            "checkpoint": checkpoint_dir(self.stage, self.steps).relative_to(self.stage.path).as_posix(),
            **self.values,
        }
