"""Config and machine -> the recipe and runtime of each stage, and what the whole run will take.

Numbers of the model and its optimizer come from `scaling.py`, bytes, seconds and dollars from `estimate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from picollm import estimate, hardware
from picollm.config.model import Architecture
from picollm.config.recipe import ComputeDtype, EvalRuntime, Rates, Schedule, Source, TrainRecipe, TrainRuntime
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError
from picollm.hardware import Machine
from picollm.scaling import (
    Horizon,
    Params,
    architecture,
    causal_flops_per_token,
    check_batch,
    flops_per_token,
    num_params,
    pretrain_horizon,
    pretrain_rates,
    pretrain_schedule,
    sft_rates,
    sft_schedule,
)

__all__ = [
    "Params",
    "Plan",
    "StagePlan",
    "architecture",
    "causal_flops_per_token",
    "choose_attention",
    "eval_runtime",
    "exports",
    "flops_per_token",
    "make_plan",
    "num_params",
    "pretrain_recipe",
    "sft_recipe",
    "train_runtime",
]

# Rows this short spend their time in SDPA's bf16 backward on CPU: 77 against 23 CPU-ms at T 128 (MEASURED 3).
MATMUL_ATTENTION_MAX_T = 256
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
    dtype, reason = hardware.compute_dtype(machine, config.train.dtype)
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
        dtype, reason = hardware.compute_dtype(machine, config.train.dtype)
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


def choose_attention(device: str, dtype: str, row: int, requested: str = "auto") -> tuple[str, str]:
    """The attention kernel and why.

    Args:
        device: `cpu` or `cuda`.
        row: tokens in a row, T.
        requested: `model.attention`.

    Returns:
        ("matmul" | "sdpa", reason for a human)
    """
    if requested != "auto":
        return requested, "`model.attention` asks for it"
    if device == "cpu" and dtype == "bfloat16" and row <= MATMUL_ATTENTION_MAX_T:
        return "matmul", f"on CPUs SDPA's bfloat16 backward is slow at {row} tokens a row"
    return "sdpa", f"the fastest kernel for {dtype} at {row} tokens a row on this device"


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
    check_batch(key, batch_tokens, row * ranks, of=f"{row} tokens a row on {ranks} ranks" if ranks > 1 else
                "`model.max_position_embeddings`")  # fmt: skip
    rows = batch_tokens // row // ranks
    asked = config.train.device_batch_size
    if asked is not None:
        check_batch(key, batch_tokens, asked * row * ranks, of=f"{asked} rows (`train.device_batch_size`) of {row} "
                    f"tokens on {ranks} rank{'s' * (ranks > 1)}")  # fmt: skip
        return asked
    device = device_of(machine)
    attention, _ = choose_attention(device, dtype, row, config.model.attention)
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
    attention, _ = choose_attention(device, recipe.dtype, recipe.model.max_position_embeddings, config.model.attention)
    return TrainRuntime(
        ranks=ranks,
        threads=choose_threads(config, machine, ranks)[0],
        device_batch_size=device_batch(
            config, machine, recipe.model, recipe.dtype, recipe.batch_tokens, key=key, ranks=ranks
        ),
        attention=attention,
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


# -- the whole run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run; `steps` and `tokens` are None where nothing is trained."""

    name: str
    time_s: float
    steps: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Export:
    """Whether a run's model can be written in a format, and why or why not."""

    possible: bool
    reason: str


def exports(arch: Architecture) -> dict[str, Export]:
    """Formats that stock runtimes read, by the features of the shape (MODEL 2-4)."""
    if arch.head_dim * arch.num_attention_heads % 32 or arch.hidden_size % 32 or arch.intermediate_size % 32:
        gguf = Export(True, "float types only: quantised rows need widths that are multiples of 32")
    elif arch.head_dim * arch.num_attention_heads % 256 or arch.hidden_size % 256 or arch.intermediate_size % 256:
        gguf = Export(True, "all but K-quants, whose rows need widths that are multiples of 256")
    else:
        gguf = Export(True, "every feature folds into a stock architecture")
    return {"gguf": gguf, "transformers": Export(True, "every feature folds into a stock architecture")}


@dataclass(frozen=True)
class Plan:
    """What a run is and what it will take. Memory is the peak of one training process; time is on this machine."""

    architecture: Architecture
    params: Params
    flops_per_token: float
    pretrain: Horizon
    sft: Horizon
    rates: Rates
    schedule: Schedule
    device: str
    dtype: ComputeDtype
    dtype_reason: str
    ranks: int
    threads: int
    threads_reason: str
    attention: str
    attention_reason: str
    device_batch_size: int
    memory: estimate.Memory
    disk_bytes: int
    money_usd: float | None
    stages: tuple[StagePlan, ...]
    exports: dict[str, Export]

    @property
    def memory_bytes(self) -> int:
        return self.memory.total

    @property
    def time_s(self) -> float:
        return sum(stage.time_s for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The dry run's JSON (DESIGN 11), figures rounded to what the estimates are worth."""
        return {
            "memory_gib": round(self.memory_bytes / 2**30, 2),
            "time_s": round(self.time_s, 1),
            "disk_gib": round(self.disk_bytes / 2**30, 3),
            "money_usd": None if self.money_usd is None else round(self.money_usd, 2),
            "num_params": self.params.total,
            "flops_per_token": self.flops_per_token,
            "device": self.device,
            "ranks": self.ranks,
            "dtype": {"value": self.dtype, "reason": self.dtype_reason},
            "threads": {"value": self.threads, "reason": self.threads_reason},
            "attention": {"value": self.attention, "reason": self.attention_reason},
            "device_batch_size": self.device_batch_size,
            "model": self.architecture.model_dump(mode="json"),
            "pretrain": {
                "steps": self.pretrain.steps,
                "batch_tokens": self.pretrain.batch_tokens,
                "tokens": self.pretrain.tokens,
                "rates": self.rates.model_dump(mode="json"),
                "schedule": self.schedule.model_dump(mode="json"),
            },
            "stages": [
                {"name": s.name, "time_s": round(s.time_s, 1), "steps": s.steps, "tokens": s.tokens}
                for s in self.stages
            ],
            "exports": {name: {"possible": e.possible, "reason": e.reason} for name, e in self.exports.items()},
        }


def make_plan(
    config: RunConfig,
    machine: Machine,
    *,
    ranks: int = 1,
    price_per_hour: float | None = None,
    dataset_chars: int | None = None,
    sft_tokens: int | None = None,
) -> Plan:
    """Estimate a whole run before anything is made.

    Args:
        ranks: processes that train, one per GPU.
        price_per_hour: dollars an hour for the whole machine; None takes the table's price of known GPUs.
        dataset_chars: characters of the training split when the dataset is there.
        sft_tokens: tokens of the conversations when they have been counted.

    Raises:
        ConfigError: shapes or batches that do not divide.
    """
    recipe = pretrain_recipe(config, machine, tokenizer_vocab=config.tokenizer.vocab_size, tokenizer_sha256="", data=())
    arch, device = recipe.model, device_of(machine)
    params = num_params(arch)
    pretrain = pretrain_horizon(config, arch)
    sft = sft_horizon(config, arch, pretrain.batch_tokens, sft_tokens or estimate.TOY_WORLD_CHAT_TOKENS)
    runtime = train_runtime(config, machine, recipe, ranks=ranks)
    threads, threads_reason = choose_threads(config, machine, ranks)
    attention, attention_reason = choose_attention(
        device, recipe.dtype, arch.max_position_embeddings, config.model.attention
    )
    speed = estimate.training_speed(machine, recipe.dtype, threads, ranks)
    # A dataset that was counted is there and needs no more room.
    chars = dataset_chars or estimate.dataset_chars(config.data.dataset, pretrain.tokens)
    missing = 0 if dataset_chars else estimate.dataset_bytes(chars)
    stages = (
        StagePlan("tokenizer", estimate.tokenizer_time(min(chars, config.tokenizer.max_chars))),
        StagePlan("pretrain", estimate.training_time(arch, pretrain.tokens, speed), pretrain.steps, pretrain.tokens),
        StagePlan("sft", estimate.training_time(arch, sft.tokens, speed), sft.steps, sft.tokens),
        StagePlan("eval", estimate.eval_time(arch, config, chars, speed)),
        StagePlan("report", estimate.REPORT_TIME_S),
    )
    hours = sum(stage.time_s for stage in stages) / 3600
    hourly = price_per_hour if price_per_hour is not None else estimate.price_per_hour(machine, ranks)
    return Plan(
        architecture=arch,
        params=params,
        flops_per_token=flops_per_token(arch),
        pretrain=pretrain,
        sft=sft,
        rates=recipe.rates,
        schedule=recipe.schedule,
        device=device,
        dtype=recipe.dtype,
        dtype_reason=recipe.dtype_reason,
        ranks=ranks,
        threads=threads,
        threads_reason=threads_reason,
        attention=attention,
        attention_reason=attention_reason,
        device_batch_size=runtime.device_batch_size,
        memory=estimate.training_memory(arch, recipe.dtype, runtime.device_batch_size, device, attention),
        disk_bytes=estimate.disk(params, config.train.keep_last) + missing,
        money_usd=None if hourly is None else hours * hourly,
        stages=stages,
        exports=exports(arch),
    )
