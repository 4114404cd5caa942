"""Config and machine -> recipe and runtime of each training stage: the two halves of its `config.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from picollm import estimate, hardware
from picollm.attention_choice import AttentionDevice, choose_attention
from picollm.config.model import Architecture
from picollm.config.recipe import EvalRuntime, Source, TrainRecipe, TrainRuntime
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError
from picollm.hardware import Machine
from picollm.scaling import (
    Horizon,
    architecture,
    check_batch,
    num_params,
    pretrain_horizon,
    pretrain_rates,
    pretrain_schedule,
    sft_rates,
    sft_schedule,
)

# More tokens per forward pass gain nothing on a CPU and cost memory.
CPU_MICRO_BATCH_TOKENS = 8192
# Shares of memory that training may plan for: other programs need some, and estimates err.
CPU_MEMORY_SHARE = 0.5
GPU_MEMORY_SHARE = 0.9


# -- recipes ----------------------------------------------------------------------------------------------------------


def pretrain_recipe(
    config: RunConfig,
    machine: Machine,
    *,
    tokenizer_vocab: int,
    tokenizer_sha256: str,
    data: Sequence[Source],
) -> TrainRecipe:
    """What `pretrain` trains, every number decided.

    Raises:
        ConfigError: shapes or a batch that do not divide.
    """
    arch = architecture(config, tokenizer_vocab)
    horizon = pretrain_horizon(config, arch)
    dtype, reason = choose_dtype(config, machine)
    return TrainRecipe(
        stage="pretrain",
        seed=config.seed,
        model=arch,
        dtype=dtype,
        dtype_reason=reason,
        steps=horizon.steps,
        batch_tokens=horizon.batch_tokens,
        rates=pretrain_rates(config, arch, horizon),
        schedule=pretrain_schedule(horizon.steps),
        data=tuple(data),
        buffer_documents=config.data.buffer_documents,
        tokenizer_sha256=tokenizer_sha256,
    )


def sft_horizon(config: RunConfig, arch: Architecture, pretrain_batch_tokens: int, num_tokens: int | None) -> Horizon:
    """Steps and batch of fine-tuning: `sft.steps`, else one pass over `num_tokens`.

    Raises:
        ConfigError: `sft.batch_tokens` is not a multiple of T, or neither steps nor tokens are known.
    """
    batch = config.sft.batch_tokens or pretrain_batch_tokens
    check_batch("sft.batch_tokens", batch, arch.max_position_embeddings)
    if config.sft.steps is None and num_tokens is None:
        raise ConfigError(
            "the length of fine-tuning is open",
            cause="`sft.steps` is not set and the conversations have not been counted",
            hint="give it with `--set sft.steps=200`",
        )
    steps = config.sft.steps or max(1, math.ceil(num_tokens / batch))
    return Horizon(steps, batch, steps * batch / num_params(arch).scaling)


def sft_recipe(
    config: RunConfig,
    machine: Machine,
    pretrain: TrainRecipe,
    *,
    data: Sequence[Source],
    init_from: str,
    num_tokens: int | None = None,
) -> TrainRecipe:
    """What `sft` trains: pretraining's model, batch, compute type and rates, with its own horizon and schedule.

    Args:
        machine: decides the compute type only when `train.dtype` no longer asks for pretraining's.
        data: datasets of conversations with their shares.
        init_from: sha256 of pretraining's `model.safetensors`.
        num_tokens: tokens in the conversations, for one pass when `sft.steps` is None.

    Raises:
        ConfigError: as in `sft_horizon`.
    """
    horizon = sft_horizon(config, pretrain.model, pretrain.batch_tokens, num_tokens)
    dtype, reason = pretrain.dtype, "as in pretraining"
    if config.train.dtype not in ("auto", pretrain.dtype):
        dtype, reason = choose_dtype(config, machine)
    return pretrain.model_copy(
        update={
            "stage": "sft",
            "seed": config.seed,
            "dtype": dtype,
            "dtype_reason": reason,
            "steps": horizon.steps,
            "batch_tokens": horizon.batch_tokens,
            "rates": sft_rates(pretrain.rates, config.sft.lr_scale),
            "schedule": sft_schedule(horizon.steps),
            "data": tuple(data),
            "buffer_documents": config.data.buffer_documents,
            "init_from": init_from,
        }
    )


# -- runtimes ---------------------------------------------------------------------------------------------------------


def device_of(machine: Machine) -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if machine.gpus else "cpu"


def attention_device(machine: Machine) -> AttentionDevice:
    """What is known of the machine's kernels before torch was asked: its bundled libraries are taken to be there."""
    if not machine.gpus:
        return AttentionDevice("cpu")
    return AttentionDevice("cuda", capability=min(gpu.capability for gpu in machine.gpus))


def choose_dtype(config: RunConfig, machine: Machine) -> tuple[str, str]:
    """The compute type, and why; the reason of a forced one does not vary with the machine: recipes are hashed."""
    if config.train.dtype != "auto":
        return config.train.dtype, "`train.dtype` asks for it"
    return hardware.compute_dtype(machine)


def choose_threads(config: RunConfig, machine: Machine, ranks: int = 1) -> tuple[int, str]:
    """CPU threads of each rank, and why."""
    if config.train.threads is not None:
        return config.train.threads, "`train.threads` asks for it"
    return hardware.default_threads(machine, ranks)


def device_batch(
    config: RunConfig, machine: Machine, arch: Architecture, dtype: str, batch_tokens: int, *, key: str, ranks: int = 1
) -> int:
    """Rows per forward pass on one rank: the largest divisor of a rank's rows whose estimated peak fits.

    Depends on installed memory, not on what is free now, so that a run is the same when it is made again.

    Args:
        key: dotted key of the batch, for errors.

    Raises:
        ConfigError: the batch does not split over ranks, or not by `train.device_batch_size`.
    """
    row = arch.max_position_embeddings
    on_ranks = f"on {ranks} ranks" if ranks > 1 else "on one rank"
    check_batch(key, batch_tokens, row * ranks, of=f"{row} tokens a row {on_ranks}")
    rows = batch_tokens // row // ranks
    asked = config.train.device_batch_size
    if asked is not None:
        rows_asked = f"{asked} rows (`train.device_batch_size`) of {row} tokens {on_ranks}"
        check_batch(key, batch_tokens, asked * row * ranks, of=rows_asked)
        return asked
    device = device_of(machine)
    attention = choose_attention(attention_device(machine), dtype, row, requested=config.model.attention).full
    if device == "cuda":
        budget = GPU_MEMORY_SHARE * min(gpu.memory_bytes for gpu in machine.gpus)
    else:
        budget = CPU_MEMORY_SHARE * machine.memory_bytes / ranks
    for size in range(rows, 1, -1):
        if rows % size or (device == "cpu" and size * row > CPU_MICRO_BATCH_TOKENS):
            continue
        if estimate.training_memory(arch, dtype, size, device, attention).total <= budget:
            return size
    return 1


def train_runtime(config: RunConfig, machine: Machine, recipe: TrainRecipe, *, ranks: int = 1) -> TrainRuntime:
    """How a training stage is executed on this machine.

    Raises:
        ConfigError: the batch does not split over `ranks`.
    """
    train, device = config.train, device_of(machine)
    key = "train.batch_tokens" if recipe.stage == "pretrain" or config.sft.batch_tokens is None else "sft.batch_tokens"
    return TrainRuntime(
        ranks=ranks,
        threads=choose_threads(config, machine, ranks)[0],
        device_batch_size=device_batch(
            config, machine, recipe.model, recipe.dtype, recipe.batch_tokens, key=key, ranks=ranks
        ),
        # The worker resolves `auto`, by the device it really has.
        attention=config.model.attention,
        compile=device == "cuda" if train.compile is None else train.compile,
        checkpoint_every=train.checkpoint_every or checkpoint_cadence(recipe.steps),
        keep_last=train.keep_last,
        eval_every=train.eval_every or (250 if recipe.steps >= 1000 else None),
        eval_tokens=train.eval_tokens,
    )


def checkpoint_cadence(steps: int) -> int:
    """About twenty checkpoints a run, 10 to 1 000 steps apart."""
    return min(1000, max(10, round(steps / 20)))


def eval_runtime(config: RunConfig, machine: Machine) -> EvalRuntime:
    """How an evaluation is executed on this machine."""
    return EvalRuntime(threads=choose_threads(config, machine)[0], batch_size=config.eval.batch_size)
