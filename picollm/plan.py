"""What a run is and what it will take: the whole plan, before anything is made.

The arithmetic stands in files of its own: `scaling.py` (depth -> shape), `rates.py` (batch, rates, schedules),
`recipes.py` and `runtimes.py` (what each stage is told), `memory.py` and `estimate.py`. Callers find all of it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from picollm import estimate
from picollm.attention_choice import choose_attention
from picollm.config.model import Architecture
from picollm.config.recipe import ComputeDtype, TrainRecipe
from picollm.config.schema import RunConfig
from picollm.export.features import Export, exports
from picollm.hardware import Machine
from picollm.memory import copies_bytes
from picollm.rates import Horizon, pretrain_horizon
from picollm.recipes import (
    check_fp8,
    choose_dtype,
    choose_fp8,
    keep_precision,
    pretrain_recipe,
    sft_horizon,
    sft_recipe,
)
from picollm.runtimes import (
    Fit,
    attention_device,
    attention_of,
    check_ranks,
    choose_threads,
    device_of,
    eval_runtime,
    fit,
    train_runtime,
)
from picollm.scaling import Params, architecture, causal_flops_per_token, flops_per_token, num_params

__all__ = [
    "Export",
    "Fit",
    "Horizon",
    "Params",
    "Plan",
    "StagePlan",
    "architecture",
    "attention_device",
    "causal_flops_per_token",
    "check_fp8",
    "check_ranks",
    "choose_attention",
    "choose_dtype",
    "choose_fp8",
    "choose_threads",
    "device_of",
    "eval_runtime",
    "exports",
    "fit",
    "flops_per_token",
    "keep_precision",
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
class Plan:
    """What a run is and what it will take. Memory is the peak of one training process; time is on this machine.

    Attributes:
        copies_bytes: of the machine's own memory, where GPUs train: copies of what is saved beside training.
    """

    recipe: TrainRecipe
    params: Params
    flops_per_token: float
    pretrain: Horizon
    sft: Horizon
    device: str
    ranks: int
    threads: int
    threads_reason: str
    attention: str
    attention_reason: str
    fit: Fit
    copies_bytes: int
    disk_bytes: int
    download_bytes: int
    money_usd: float | None
    stages: tuple[StagePlan, ...]
    exports: dict[str, Export]

    @property
    def architecture(self) -> Architecture:
        return self.recipe.model

    @property
    def dtype(self) -> ComputeDtype:
        return self.recipe.dtype

    @property
    def memory_bytes(self) -> int:
        return self.fit.memory.total

    @property
    def time_s(self) -> float:
        return sum(stage.time_s for stage in self.stages)

    @property
    def total_flops(self) -> float:
        """Of pretraining, by the convention of `flops_per_token`."""
        return self.flops_per_token * self.pretrain.tokens

    def to_json(self) -> dict[str, Any]:
        """The dry run's JSON (DESIGN 11), figures rounded to what the estimates are worth."""
        recipe, fitted = self.recipe, self.fit
        return {
            "memory_gib": round(self.memory_bytes / 2**30, 2),
            "copies_gib": round(self.copies_bytes / 2**30, 2),
            "time_s": round(self.time_s, 1),
            "disk_gib": round(self.disk_bytes / 2**30, 3),
            "download_gib": round(self.download_bytes / 2**30, 3),
            "money_usd": None if self.money_usd is None else round(self.money_usd, 2),
            "num_params": self.params.total,
            "flops_per_token": self.flops_per_token,
            "device": self.device,
            "ranks": self.ranks,
            "dtype": {"value": recipe.dtype, "reason": recipe.dtype_reason},
            "fp8": {"value": recipe.fp8, "reason": recipe.fp8_reason},
            "threads": {"value": self.threads, "reason": self.threads_reason},
            "attention": {"value": self.attention, "reason": self.attention_reason},
            "device_batch_size": fitted.rows,
            "batch": {
                "rows_per_pass": fitted.rows,
                "passes_per_step": fitted.passes,
                "activation_checkpointing": fitted.activation_checkpointing,
                "reason": fitted.reason,
            },
            "model": recipe.model.model_dump(mode="json"),
            "pretrain": {
                "steps": self.pretrain.steps,
                "batch_tokens": self.pretrain.batch_tokens,
                "tokens": self.pretrain.tokens,
                "tokens_per_parameter": round(self.pretrain.ratio, 2),
                "flops": self.total_flops,
                "rates": recipe.rates.model_dump(mode="json"),
                "schedule": recipe.schedule.model_dump(mode="json"),
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
    ranks_per_node: int | None = None,
    price_per_hour: float | None = None,
    dataset_chars: int | None = None,
    missing_bytes: int = 0,
    stored: dict[str, Any] | None = None,
) -> Plan:
    """Estimate a whole run before anything is made.

    Args:
        ranks: processes that train, one per GPU, on all nodes; nodes are taken to be like this one.
        ranks_per_node: those on this machine; None means all of them.
        price_per_hour: dollars an hour for all machines; None takes the table's price of known GPUs.
        dataset_chars: characters of the training split when the dataset is there.
        missing_bytes: of its files that are still to be downloaded.
        stored: pretraining's recipe, when that is prepared: its compute type and fp8 stay.

    Raises:
        ConfigError: shapes or batches that do not divide; more ranks than GPUs; a compute type, fp8 or attention that
            is asked for and cannot be had.
    """
    here = ranks_per_node or ranks
    check_ranks(machine, here)
    recipe = pretrain_recipe(config, machine, tokenizer_vocab=config.tokenizer.vocab_size, tokenizer_sha256="", data=())
    if stored is not None:
        recipe = keep_precision(recipe, stored, config)
    arch, params = recipe.model, num_params(recipe.model)
    pretrain = pretrain_horizon(config, arch)
    sft = sft_horizon(config, arch, pretrain.batch_tokens, estimate.TOY_WORLD_CHAT_TOKENS)
    fitted = fit(config, machine, recipe, ranks=ranks, ranks_per_node=here)
    threads, threads_reason = choose_threads(config, machine, here)
    attention = attention_of(config, machine, arch, recipe.dtype)
    speed = estimate.training_speed(
        arch, machine, recipe.dtype, threads, ranks, fp8=recipe.fp8, checkpointing=fitted.activation_checkpointing
    )
    # A dataset that was counted is there and needs no more room.
    whole = sum(weight for _, weight in config.data.sources)
    parts = [(name, round(pretrain.tokens * weight / whole)) for name, weight in config.data.sources]
    chars = dataset_chars or sum(estimate.dataset_chars(name, tokens) for name, tokens in parts)
    download = missing_bytes if dataset_chars else sum(estimate.download_bytes(name, tokens) for name, tokens in parts)
    missing = download if download or dataset_chars else estimate.dataset_bytes(chars)
    stages = (
        *([StagePlan("data", download / estimate.DOWNLOAD_BYTES_PER_S)] if download else []),
        StagePlan("tokenizer", estimate.tokenizer_time(min(chars, config.tokenizer.max_chars))),
        StagePlan("pretrain", estimate.training_time(pretrain.tokens, speed), pretrain.steps, pretrain.tokens),
        StagePlan("sft", estimate.training_time(sft.tokens, speed), sft.steps, sft.tokens),
        # One process evaluates, however many have trained.
        StagePlan("eval", estimate.eval_time(config, chars, speed / ranks)),
        StagePlan("report", estimate.REPORT_TIME_S),
    )
    hours = sum(stage.time_s for stage in stages) / 3600
    hourly = price_per_hour if price_per_hour is not None else estimate.price_per_hour(machine, ranks)
    return Plan(
        recipe=recipe,
        params=params,
        flops_per_token=flops_per_token(arch),
        pretrain=pretrain,
        sft=sft,
        device=device_of(machine),
        ranks=ranks,
        threads=threads,
        threads_reason=threads_reason,
        attention=str(attention),
        attention_reason=attention.reason,
        fit=fitted,
        copies_bytes=copies_bytes(arch, recipe.dtype, ranks=ranks, ranks_per_node=here) if machine.gpus else 0,
        disk_bytes=estimate.disk(params, config.train.keep_last) + missing,
        download_bytes=download,
        money_usd=None if hourly is None else hours * hourly,
        stages=stages,
        exports=exports(arch, digits=config.tokenizer.digits),
    )
