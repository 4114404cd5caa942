"""Config and machine -> the recipe of each training stage: what is trained, the first half of its `config.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from picollm import hardware
from picollm.config.model import Architecture
from picollm.config.recipe import Source, TrainRecipe
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError
from picollm.hardware import Machine
from picollm.rates import (
    Horizon,
    check_batch,
    pretrain_horizon,
    pretrain_rates,
    pretrain_schedule,
    sft_rates,
    sft_schedule,
)
from picollm.scaling import architecture, num_params

# Quantising costs more than 8-bit products gain in narrow models: nanochat's d12 lost, d24 (1 536) and d26 won 15 to
# 17 % (GPU.md 2a); nothing between was measured.
FP8_MIN_HIDDEN_SIZE = 1536
# Hopper and data-centre Blackwell, whose 8-bit units are twice as fast as the 16-bit ones in training.
FP8_CAPABILITIES = ((9, 0), (12, 0))


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
        ConfigError: shapes or a batch that do not divide; or fp8 is asked for where it cannot be had.
    """
    arch = architecture(config, tokenizer_vocab)
    horizon = pretrain_horizon(config, arch)
    dtype, reason = choose_dtype(config, machine)
    fp8, fp8_reason = choose_fp8(config, machine, arch, dtype)
    return TrainRecipe(
        stage="pretrain",
        seed=config.seed,
        model=arch,
        dtype=dtype,
        dtype_reason=reason,
        fp8=fp8,
        fp8_reason=fp8_reason,
        z_loss=config.train.z_loss,
        steps=horizon.steps,
        batch_tokens=horizon.batch_tokens,
        rates=pretrain_rates(config, arch, horizon),
        schedule=pretrain_schedule(horizon.steps),
        data=tuple(data),
        packing=config.data.packing,
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
        machine: decides the compute type only when `train.dtype` no longer asks for pretraining's, and fp8 only where
            this machine cannot do what pretraining's did.
        data: datasets of conversations with their shares.
        init_from: sha256 of pretraining's `model.safetensors`.
        num_tokens: tokens in the conversations, for one pass when `sft.steps` is None.

    Raises:
        ConfigError: as in `sft_horizon`; or fp8 is asked for where it cannot be had.
    """
    horizon = sft_horizon(config, pretrain.model, pretrain.batch_tokens, num_tokens)
    dtype, reason = pretrain.dtype, "as in pretraining"
    if config.train.dtype not in ("auto", pretrain.dtype):
        dtype, reason = choose_dtype(config, machine)
    fp8, fp8_reason = pretrain.fp8, "as in pretraining"
    if config.train.fp8 not in (None, fp8) or (fp8 and not may_use_fp8(machine, dtype)):
        fp8, fp8_reason = choose_fp8(config, machine, pretrain.model, dtype)
    return pretrain.model_copy(
        update={
            "stage": "sft",
            "seed": config.seed,
            "dtype": dtype,
            "dtype_reason": reason,
            "fp8": fp8,
            "fp8_reason": fp8_reason,
            "z_loss": config.train.z_loss,
            "steps": horizon.steps,
            "batch_tokens": horizon.batch_tokens,
            "rates": sft_rates(pretrain.rates, config.sft.lr_scale),
            "schedule": sft_schedule(horizon.steps),
            "data": tuple(data),
            "packing": "whole",
            "buffer_documents": config.data.buffer_documents,
            "init_from": init_from,
        }
    )


# -- precision --------------------------------------------------------------------------------------------------------


def choose_dtype(config: RunConfig, machine: Machine) -> tuple[str, str]:
    """The compute type, and why; the reason of a forced one does not vary with the machine: recipes are hashed."""
    if config.train.dtype != "auto":
        return config.train.dtype, "`train.dtype` asks for it"
    return hardware.compute_dtype(machine)


def keep_precision(recipe: TrainRecipe, stored: dict[str, Any], config: RunConfig) -> TrainRecipe:
    """A stage's recipe with compute type and fp8 as first decided: what was left open must not change with the machine.

    A reason also stays where a value that was asked for is still the same.

    Args:
        stored: the recipe in the stage's `config.json`.
    """
    stored = {"fp8": False, "fp8_reason": ""} | stored  # there was no choice in the first version
    kept: list[str] = []
    if config.train.dtype in ("auto", stored["dtype"]):
        kept += ["dtype", "dtype_reason"]
    if config.train.fp8 in (None, stored["fp8"]):
        kept += ["fp8", "fp8_reason"]
    return recipe.model_copy(update={key: stored[key] for key in kept})


def choose_fp8(config: RunConfig, machine: Machine, arch: Architecture, dtype: str) -> tuple[bool, str]:
    """Whether the large matrices multiply in 8 bits, and why.

    Raises:
        ConfigError: `train.fp8` asks for it and this machine or compute type cannot.
    """
    asked = config.train.fp8
    if asked is None:
        return _automatic_fp8(machine, arch, dtype)
    if asked:
        check_fp8(machine, dtype)
        if not machine.gpus:
            return True, "`train.fp8` asks for it; a CPU imitates it, more slowly than bfloat16"
    return asked, "`train.fp8` asks for it" if asked else "`train.fp8` forbids it"


def _automatic_fp8(machine: Machine, arch: Architecture, dtype: str) -> tuple[bool, str]:
    if not machine.gpus:
        return False, "8-bit products are faster on GPUs alone"
    major, minor = capability = hardware.weakest_capability(machine)
    if capability < hardware.FP8_CAPABILITY:
        return False, f"the GPU has no 8-bit tensor cores (compute capability {major}.{minor}, they begin at 8.9)"
    lowest, beyond = FP8_CAPABILITIES
    if not lowest <= capability < beyond:
        return False, f"no gain is known for compute capability {major}.{minor}; `train.fp8=true` tries it"
    if dtype != "bfloat16":
        return False, f"8-bit products go with bfloat16, and the run is {dtype}"
    if arch.hidden_size < FP8_MIN_HIDDEN_SIZE:
        return False, f"quantising would cost more than it gains below a width of {FP8_MIN_HIDDEN_SIZE}"
    return True, f"the GPU has 8-bit tensor cores (compute capability {major}.{minor}) and the model is wide enough"


def may_use_fp8(machine: Machine, dtype: str) -> bool:
    """Whether 8-bit products are possible at all."""
    return dtype == "bfloat16" and hardware.can_multiply_fp8(machine)


def check_fp8(machine: Machine, dtype: str) -> None:
    """Refuse fp8 where it is not possible.

    Raises:
        ConfigError: the compute type is not bfloat16, or a GPU has no 8-bit tensor cores.
    """
    if may_use_fp8(machine, dtype):
        return
    if not hardware.can_multiply_fp8(machine):
        major, minor = hardware.weakest_capability(machine)
        raise ConfigError(
            "`train.fp8` (true) is not possible on this GPU",
            cause=f"its compute capability is {major}.{minor}; 8-bit tensor cores begin at 8.9",
            hint="use `--set train.fp8=false`, in a new run where the stage has started with 8 bits",
        )
    raise ConfigError(
        f"`train.fp8` (true) does not go with `train.dtype` ({dtype})",
        cause="8-bit products take and give bfloat16",
        hint="use `--set train.dtype=bfloat16`, or `--set train.fp8=false`",
    )
