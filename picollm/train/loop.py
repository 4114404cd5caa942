"""The one training loop: pretraining and SFT differ in where batches come from and what is evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.data.packing import Batches
from picollm.errors import ConfigError, Interrupted, WorkerError
from picollm.files import sha256_json
from picollm.model.gpt import GPT
from picollm.optim.muon import MuonAdamW
from picollm.scaling import flops_per_token
from picollm.train import checkpoint, distributed
from picollm.train.checkpoint_files import checkpoint_dir
from picollm.train.metrics import memory_gib, peak_flops
from picollm.worker import Worker

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run is stopped

# step -> values to record, by name
Evaluate = Callable[[int], dict[str, float]]


@dataclass
class Job:
    """One stage's training: everything that differs between stages, assembled by the stage."""

    recipe: TrainRecipe
    runtime: TrainRuntime
    model: GPT
    optimizer: MuonAdamW
    batches: Batches
    evaluate: Evaluate
    device: torch.device


def build_model(recipe: TrainRecipe, attention: str, device: torch.device) -> tuple[GPT, MuonAdamW]:
    """The recipe's model with its first weights, and its optimizer."""
    compute = getattr(torch, recipe.dtype)
    model = GPT(recipe.model, compute_dtype=compute, backend=attention)
    if compute == torch.float64:
        model = model.double()
    model.init_weights(recipe.seed)
    model.to(device)
    return model, MuonAdamW(model, recipe.rates, recipe.schedule, recipe.steps, dtype=compute)


def train(worker: Worker, job: Job) -> dict[str, Any]:
    """Run the job from its last checkpoint to its end; returns the figures for the stage record.

    Raises:
        Interrupted: a stop was asked for; the state is saved.
        WorkerError: several steps in a row were not finite; the last good state is saved.
        IntegrityError: there are checkpoints and none is intact.
        ConfigError: the newest checkpoint was made with another recipe.
    """
    stage, recipe, runtime = worker.stage, job.recipe, job.runtime
    meta, warnings = checkpoint.resume(stage, job.model, job.optimizer)
    start = 0
    cpu_before = 0.0
    recipe_sha256 = sha256_json(recipe.model_dump(mode="json"))
    if meta is not None:
        if meta["recipe_sha256"] != recipe_sha256:
            raise ConfigError(
                f"the checkpoint of step {meta['step']} was made with another recipe than `{stage.config_path}` has",
                cause=f"its recipe's sha256 is {meta['recipe_sha256'][:12]}…, the one there {recipe_sha256[:12]}…",
                hint=f"undo the edit, or redo the stage with `picollm speedrun --run {stage.run.name} "
                f"--force {stage.name}`",
            )
        start, cpu_before = meta["step"], meta["cpu_s"]
        job.batches.packer.restore(meta["data"])
    worker.start(resumed_from=start, total_steps=recipe.steps)
    for text in warnings:
        worker.note(text, level="warning")
    saved_at = start if meta is not None else -1
    last_loss: float | None = meta["loss"] if meta is not None else None
    values: dict[str, float] = {}

    def save(step: int) -> None:
        nonlocal saved_at
        if saved_at == step:
            return
        saved_at = step
        if worker.rank != 0:
            return
        started = time.monotonic()
        path, size = checkpoint.save(
            stage,
            step,
            job.model,
            job.optimizer,
            {
                "recipe_sha256": recipe_sha256,
                "tokenizer_sha256": recipe.tokenizer_sha256,
                "data": job.batches.packer.state(),
                "loss": last_loss,
                "cpu_s": round(cpu_before + time.process_time(), 3),
            },
            keep_last=runtime.keep_last,
        )
        took = round(time.monotonic() - started, 3)
        worker.event("checkpoint", step=step, path=path.relative_to(stage.path).as_posix(), bytes=size, dt_s=took)

    def evaluate(step: int) -> None:
        if worker.rank == 0:
            values.update(job.evaluate(step))
            for name, value in values.items():
                worker.event("eval", step=step, name=name, value=value)

    flops, peak = flops_per_token(recipe.model), peak_flops(job.device)
    bad = 0
    for step in range(start, recipe.steps):
        before = time.monotonic()
        loss, grad_norm, stop = _gradients(worker, job)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            job.optimizer.step(step)
            last_loss, bad = loss, 0
        else:
            job.optimizer.zero_grad()
            bad += 1
            worker.note(
                f"step {step + 1} was not finite (loss {loss}, gradient norm {grad_norm}); skipped", level="warning"
            )
            if bad == MAX_BAD_STEPS:
                save(step + 1 - bad)
                raise WorkerError(
                    f"{bad} steps in a row were not finite",
                    cause=f"the last loss was {loss}, the last gradient norm {grad_norm}",
                    hint="lower the rates (`--set train.matrix_lr=…`) in a new run; the last good state is saved",
                )
        dt = time.monotonic() - before
        done = step + 1
        tokens_per_s = recipe.batch_tokens / dt
        worker.event(
            "step",
            step=done,
            loss=round(loss, 6),
            lr=round(job.optimizer.rates_at(step)["matrix"], 8),
            tokens=done * recipe.batch_tokens,
            tokens_per_s=round(tokens_per_s, 1),
            mfu=round(flops * tokens_per_s / (peak * worker.world), 4) if peak else None,
            grad_norm=round(grad_norm, 6),
            mem_gib=round(memory_gib(job.device), 3),
            dt_s=round(dt, 4),
        )
        due = runtime.eval_every is not None and done % runtime.eval_every == 0 and done < recipe.steps
        if done % runtime.checkpoint_every == 0 or due or done == recipe.steps:
            save(done)  # always before an evaluation
        if stop and done < recipe.steps:
            save(done)
            raise Interrupted(f"stopped at step {done} of {recipe.steps}, state saved")
        if due:
            evaluate(done)
    evaluate(recipe.steps)
    return {
        "step": recipe.steps,
        "loss": last_loss,
        "tokens": recipe.steps * recipe.batch_tokens,
        "epochs": round(job.batches.packer.epoch, 3),
        "cpu_s": round(cpu_before + time.process_time(), 1),
        "checkpoint": checkpoint_dir(stage, recipe.steps).relative_to(stage.path).as_posix(),
        **values,
    }


def _gradients(worker: Worker, job: Job) -> tuple[float, float, bool]:
    """One step's gradients, summed over micro-batches and ranks.

    Returns:
        (mean loss in nats per trained token, global gradient norm, whether any rank wants to stop).
    """
    micro_batches, count = job.batches.next_step()
    total = torch.zeros(2, dtype=torch.float64, device=job.device)
    for inputs, targets in micro_batches:
        ids = torch.from_numpy(inputs).to(job.device)
        wanted = torch.from_numpy(targets).to(job.device)
        loss = job.model.loss(ids, wanted, scale=1.0 / max(1, count))
        loss.backward()
        total[0] += loss.detach()
    total[1] = float(worker.should_stop())
    distributed.all_reduce_sum(total)
    parameters = [p for p in job.model.parameters() if p.grad is not None]
    distributed.sum_gradients(parameters)
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    return float(total[0]), float(norm), bool(total[1])
