"""One training configuration on synthetic tokens: its speed, share of the peak, memory, and where a step's time goes.

What is timed is the loop's own `Trainer.step`; the parts of a step are then measured one by one, each waited for, so
their sum is a little more than a step in which they overlap.

Letters: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from picollm.attention_choice import attention_for
from picollm.bench.profiling import kernel_times, shares
from picollm.bench.timing import synchronize
from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.data.prefetch import StepBatches
from picollm.memory import training_memory
from picollm.model.attention import attention_device
from picollm.scaling import causal_flops_per_token, flops_per_token
from picollm.train.metrics import memory, peak_flops
from picollm.train.step import Trainer, build_trainer

# Steps before the timed ones: the first compiles, the second still fills allocators.
WARMUP_STEPS = 2
PART_REPEATS = 3


def synthetic(recipe: TrainRecipe, runtime: TrainRuntime, rank: int, device: torch.device) -> StepBatches:
    """Random tokens for one step of one rank, in host memory as the loop's are."""
    T, vocab = recipe.model.max_position_embeddings, recipe.model.vocab_size
    rows = recipe.batch_tokens // T // runtime.ranks
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(vocab, (rows, T + 1), generator=generator)
    pairs = []
    for part in tokens.split(runtime.device_batch_size):
        inputs, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        pairs.append((inputs.pin_memory(), targets.pin_memory()) if device.type == "cuda" else (inputs, targets))
    return StepBatches(pairs, recipe.batch_tokens, {}, 0.0)


def measure(
    recipe: TrainRecipe,
    runtime: TrainRuntime,
    rank: int,
    device: torch.device,
    *,
    steps: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train `steps` timed steps and return the figures.

    Args:
        tell: called with what is going on, before it takes long.

    Returns:
        tokens_per_s (all ranks), step_s (median) and its spread, first_step_s (compiling), mfu and mfu_causal (shares
        of the compute type's peak; None without a data sheet), peak_gib of a rank (tensors of a GPU, the process on a
        CPU) and estimated_gib, parts_s (forward, backward, update of one step), kernels (share of a micro-step by
        kind; GPUs only), attention, loss of first and last step.
    """
    arch = recipe.model
    attention = attention_for(arch, recipe.dtype, attention_device(device), runtime.attention)
    trainer = build_trainer(recipe, runtime, attention, device)
    batches = synthetic(recipe, runtime, rank, device)
    tell("compiling…" if runtime.compile else "first step…")
    synchronize(device)
    started = time.perf_counter()
    losses = [trainer.step(0, batches).read().loss]
    first_step_s = time.perf_counter() - started
    for number in range(1, WARMUP_STEPS):
        losses.append(trainer.step(number, batches).read().loss)
    tell("timing steps…")
    seconds = []
    for number in range(WARMUP_STEPS, WARMUP_STEPS + steps):
        started = time.perf_counter()
        pending = trainer.step(number, batches)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        losses.append(pending.read().loss)
    used = memory(device).allocated_gib
    tell("timing parts of a step…")
    parts = _parts(trainer, batches, WARMUP_STEPS + steps)
    median = statistics.median(seconds)
    speed = recipe.batch_tokens / median
    peak = peak_flops(device, recipe.dtype)
    estimated = training_memory(
        arch,
        recipe.dtype,
        runtime.device_batch_size,
        device.type,
        attention,
        passes=len(batches.micro_batches),
        fp8=recipe.fp8,
        ranks=runtime.ranks,
        checkpointing=runtime.activation_checkpointing,
        gpu_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )
    return {
        "tokens_per_s": round(speed, 1),
        "step_s": round(median, 5),
        "step_s_min": round(min(seconds), 5),
        "step_s_max": round(max(seconds), 5),
        "first_step_s": round(first_step_s, 2),
        "mfu": _share(flops_per_token(arch) * speed, peak, runtime.ranks),
        "mfu_causal": _share(causal_flops_per_token(arch) * speed, peak, runtime.ranks),
        "peak_gib": round(used, 3),
        "estimated_gib": round((estimated.total - (estimated.base if device.type == "cuda" else 0)) / 2**30, 3),
        "parts_s": {name: round(value, 5) for name, value in parts.items()},
        "kernels": _kernels(trainer, batches) if device.type == "cuda" else None,
        "attention": str(attention),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
    }


def _share(flops_per_s: float, peak: float | None, ranks: int) -> float | None:
    return None if peak is None else round(flops_per_s / (peak * ranks), 4)


def _parts(trainer: Trainer, batches: StepBatches, number: int) -> dict[str, float]:
    """Median seconds of one step's forward passes, backward passes, and update (reduction between ranks included)."""
    device, found = trainer.device, {"forward": [], "backward": [], "update": []}
    keep = torch.ones((), device=device)
    for repeat in range(PART_REPEATS):
        spent = dict.fromkeys(found, 0.0)

        def timed(name: str, call: Callable[[], Any], spent: dict[str, float] = spent) -> Any:
            synchronize(device)
            started = time.perf_counter()
            result = call()
            synchronize(device)
            spent[name] += time.perf_counter() - started
            return result

        for inputs, targets in batches.micro_batches:
            ids, wanted = inputs.to(device), targets.to(device)
            loss = timed("forward", lambda ids=ids, wanted=wanted: trainer.model.loss(ids, wanted, 1 / batches.count))
            timed("backward", loss.backward)

        def update(repeat: int = repeat) -> None:
            trainer.optimizer.grad_square()
            trainer.optimizer.step(number + repeat, keep=keep)

        timed("update", update)
        for name, value in spent.items():
            found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def _kernels(trainer: Trainer, batches: StepBatches) -> dict[str, float]:
    """Share of one micro-step's time by kind of kernel; `idle` is what none covers."""
    ids, wanted = (x.to(trainer.device) for x in batches.micro_batches[0])

    def micro_step() -> None:
        trainer.model.loss(ids, wanted, 1 / batches.count).backward()

    micro_step()
    synchronize(trainer.device)
    started = time.perf_counter()
    micro_step()
    synchronize(trainer.device)
    found = shares(kernel_times(micro_step, trainer.device), time.perf_counter() - started)
    trainer.optimizer.zero_grad()
    return {kind: round(share, 4) for kind, share in sorted(found.items(), key=lambda item: -item[1])}
