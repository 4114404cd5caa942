"""What a run is and what it will take: the whole plan, before anything is made.

The arithmetic stands in three files: `scaling.py` (depth -> shape, batch, rates), `recipes.py` (what each stage is
told) and `estimate.py` (bytes, seconds, dollars). Callers find all of it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from picollm import estimate
from picollm.attention_choice import choose_attention
from picollm.config.model import Architecture
from picollm.config.recipe import ComputeDtype, Rates, Schedule
from picollm.config.schema import RunConfig
from picollm.hardware import Machine
from picollm.recipes import (
    attention_device,
    choose_dtype,
    choose_threads,
    device_of,
    eval_runtime,
    pretrain_recipe,
    sft_horizon,
    sft_recipe,
    train_runtime,
)
from picollm.scaling import (
    Horizon,
    Params,
    architecture,
    causal_flops_per_token,
    flops_per_token,
    num_params,
    pretrain_horizon,
)

__all__ = [
    "Export",
    "Horizon",
    "Params",
    "Plan",
    "StagePlan",
    "architecture",
    "attention_device",
    "causal_flops_per_token",
    "choose_attention",
    "choose_dtype",
    "choose_threads",
    "device_of",
    "eval_runtime",
    "exports",
    "flops_per_token",
    "make_plan",
    "num_params",
    "pretrain_recipe",
    "sft_recipe",
    "train_runtime",
]


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
) -> Plan:
    """Estimate a whole run before anything is made.

    Args:
        ranks: processes that train, one per GPU.
        price_per_hour: dollars an hour for the whole machine; None takes the table's price of known GPUs.
        dataset_chars: characters of the training split when the dataset is there.

    Raises:
        ConfigError: shapes or batches that do not divide.
    """
    recipe = pretrain_recipe(config, machine, tokenizer_vocab=config.tokenizer.vocab_size, tokenizer_sha256="", data=())
    arch, device = recipe.model, device_of(machine)
    params = num_params(arch)
    pretrain = pretrain_horizon(config, arch)
    sft = sft_horizon(config, arch, pretrain.batch_tokens, estimate.TOY_WORLD_CHAT_TOKENS)
    runtime = train_runtime(config, machine, recipe, ranks=ranks)
    threads, threads_reason = choose_threads(config, machine, ranks)
    attention = choose_attention(
        attention_device(machine),
        recipe.dtype,
        arch.max_position_embeddings,
        windows=arch.sliding_window is not None,
        requested=config.model.attention,
    )
    speed = estimate.training_speed(arch, machine, recipe.dtype, threads, ranks)
    # A dataset that was counted is there and needs no more room.
    chars = dataset_chars or estimate.dataset_chars(config.data.dataset, pretrain.tokens)
    missing = 0 if dataset_chars else estimate.dataset_bytes(chars)
    stages = (
        StagePlan("tokenizer", estimate.tokenizer_time(min(chars, config.tokenizer.max_chars))),
        StagePlan("pretrain", estimate.training_time(pretrain.tokens, speed), pretrain.steps, pretrain.tokens),
        StagePlan("sft", estimate.training_time(sft.tokens, speed), sft.steps, sft.tokens),
        StagePlan("eval", estimate.eval_time(config, chars, speed)),
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
        attention=str(attention),
        attention_reason=attention.reason,
        device_batch_size=runtime.device_batch_size,
        memory=estimate.training_memory(arch, recipe.dtype, runtime.device_batch_size, device, attention.full),
        disk_bytes=estimate.disk(params, config.train.keep_last) + missing,
        money_usd=None if hourly is None else hours * hourly,
        stages=stages,
        exports=exports(arch),
    )
