"""Horizon, batch, rates and schedules of a stage, from its shape and token budget. Pure functions, no machine.

Letters: C hidden size, T tokens in a row, B tokens per step, N steps, D = N·B tokens in all, P scaling parameters.
Formulas are nanochat's (commit 92d63d4, MIT) unless said; its reference point is depth 12 at B = 2^19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from picollm.config.model import Architecture, padded_vocab_size
from picollm.config.recipe import Rates, Schedule
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError
from picollm.scaling import flops_per_token, num_params

REFERENCE_DEPTH = 12
REFERENCE_HIDDEN_SIZE = 768
REFERENCE_BATCH_TOKENS = 2**19
# Tokens per parameter at which the base rates were tuned; stands in for the ratio when steps or FLOPs are given.
REFERENCE_RATIO = 12.0
BATCH_EXPONENT = 0.383
# Below this the square root starves short runs on small batches: at 4 096 tokens a step it would be 0.09.
MIN_BATCH_LR_FACTOR = 0.8
# Matrix rate x decay x steps is 1 / 0.0709 at ratio 12 for every depth of nanochat's rule.
DECAY_TIMESCALE = 0.0709
# A tenth of the rates of x0, smear and backout was right after a million tokens (MODEL 7); nanochat's shortest run,
# depth 4 at ratio 8, takes the whole of them after 92 million.
SHORT_RUN_TOKENS = 1e8
MIN_SHORT_RUN_FACTOR = 0.1
# Value embeddings learn at half the embedding's rate.
VALUE_EMBEDDING_LR_FACTOR = 0.5


# -- horizon and batch ------------------------------------------------------------------------------------------------


def reference_tokens(ratio: float, vocab_size: int) -> float:
    """D_ref: the token budget of depth 12 at this ratio, with the run's own vocabulary as in nanochat."""
    scaling = 12 * REFERENCE_DEPTH * REFERENCE_HIDDEN_SIZE**2 + padded_vocab_size(vocab_size) * REFERENCE_HIDDEN_SIZE
    return ratio * scaling


def auto_batch_tokens(tokens: float, tokens_reference: float) -> int:
    """B = 2^round(log2(2^19 · (D / D_ref)^0.383)): the batch that suits a budget of D tokens (FACTS 2.4)."""
    return 2 ** round(math.log2(REFERENCE_BATCH_TOKENS * (tokens / tokens_reference) ** BATCH_EXPONENT))


def auto_batch_tokens_for_steps(steps: int, tokens_reference: float) -> int:
    """The same rule when the horizon is in steps: D = N·B depends on B, so solve for B, then round.

    The result is a fixed point of `auto_batch_tokens(steps * B, …)`: rounding moves B by at most half an octave,
    which moves the rule's answer by 0.19 octaves.
    """
    log2_b = math.log2(REFERENCE_BATCH_TOKENS) + BATCH_EXPONENT * math.log2(steps / tokens_reference)
    return 2 ** round(log2_b / (1 - BATCH_EXPONENT))


@dataclass(frozen=True)
class Horizon:
    """How long a stage trains: `steps` of `batch_tokens`; `ratio` is tokens per scaling parameter."""

    steps: int
    batch_tokens: int
    ratio: float

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens


def pretrain_horizon(config: RunConfig, arch: Architecture) -> Horizon:
    """Steps and batch of pretraining: steps win over FLOPs, and FLOPs over the ratio.

    However the horizon is given, the batch suits the tokens that are really trained. An automatic batch is a power of
    two, moved to the nearest multiple of T.

    Raises:
        ConfigError: `train.batch_tokens` is not a multiple of T.
    """
    train, row = config.train, arch.max_position_embeddings
    scaling = num_params(arch).scaling
    ratio = reference_ratio(config)
    reference = reference_tokens(ratio, arch.vocab_size)
    tokens = train.target_flops / flops_per_token(arch) if train.target_flops is not None else train.ratio * scaling
    batch = train.batch_tokens
    if batch is not None:
        check_batch("train.batch_tokens", batch, row)
    elif train.steps is not None:
        batch = auto_batch_tokens_for_steps(train.steps, reference)
    else:
        batch = auto_batch_tokens(tokens, reference)
    batch = max(1, round(batch / row)) * row
    steps = train.steps or max(1, int(tokens // batch))
    return Horizon(steps, batch, steps * batch / scaling)


def reference_ratio(config: RunConfig) -> float:
    """Tokens per parameter of the reference run: the run's own ratio, where its horizon is given by one."""
    given = config.train.steps is None and config.train.target_flops is None
    return config.train.ratio if given else REFERENCE_RATIO


def check_batch(key: str, batch_tokens: int, multiple: int, of: str = "`model.max_position_embeddings`") -> None:
    """Refuse a batch that does not split evenly.

    Raises:
        ConfigError: with the nearest sizes that do.
    """
    if batch_tokens % multiple == 0:
        return
    below, above = batch_tokens // multiple * multiple, -(-batch_tokens // multiple) * multiple
    choices = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"`{key}` ({batch_tokens}) is not a multiple of {multiple}",
        cause=f"{multiple} is {of}: every step is made of whole rows",
        hint=f"use {choices}, such as `--set {key}={above}`",
    )


# -- rates ------------------------------------------------------------------------------------------------------------


def batch_lr_factor(batch_tokens: int) -> float:
    """Every rate grows with the square root of the batch: max(0.8, sqrt(B / 2^19)) (FACTS 2.4; floor: MODEL 7)."""
    return max(MIN_BATCH_LR_FACTOR, math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS))


def width_lr_factor(hidden_size: int) -> float:
    """AdamW's rates shrink with width: (C / 768)^-0.5 (FACTS 2.4); Muon's and the scalars' do not."""
    return (hidden_size / REFERENCE_HIDDEN_SIZE) ** -0.5


def weight_decay(steps: int, matrix_lr: float, ratio: float = REFERENCE_RATIO) -> float:
    """Decay lambda as a timescale of the run: 1 / (0.0709 · (12 / ratio) · N · matrix rate).

    Equals nanochat's 0.28·sqrt(B / 2^19)·D_ref / D wherever that is defined, and needs no reference run: a short run
    then decays by as much, in all, as a long one.
    """
    return 1.0 / (DECAY_TIMESCALE * (REFERENCE_RATIO / ratio) * steps * matrix_lr)


def short_run_factor(tokens: int) -> float:
    """What short runs take of the rates of x0, smear and backout: sqrt(D / 1e8), between a tenth and all.

    Few parameters with large rates: over a short run their noise never averages out (.025 to .044 bits per byte,
    MODEL 7). The root joins the two horizons that are known, so no run differs much from one that is a little longer.
    """
    return min(1.0, max(MIN_SHORT_RUN_FACTOR, math.sqrt(tokens / SHORT_RUN_TOKENS)))


def pretrain_rates(config: RunConfig, arch: Architecture, horizon: Horizon) -> Rates:
    """Peak rates and decay after all scaling; 0 for parts that the architecture does not have."""
    train = config.train
    every = batch_lr_factor(horizon.batch_tokens)
    adam = every * width_lr_factor(arch.hidden_size)
    extra = every * short_run_factor(horizon.tokens)
    matrix_lr = train.matrix_lr * every
    gates = arch.smear or arch.backout
    decay = weight_decay(horizon.steps, matrix_lr, reference_ratio(config)) if train.weight_decay else 0.0
    return Rates(
        matrix_lr=_six_digits(matrix_lr),
        embedding_lr=_six_digits(train.embedding_lr * adam),
        unembedding_lr=_six_digits(train.unembedding_lr * adam),
        scalar_lr=_six_digits(train.scalar_lr * every),
        value_embedding_lr=_six_digits(arch.value_embeddings * VALUE_EMBEDDING_LR_FACTOR * train.embedding_lr * adam),
        x0_lr=_six_digits(arch.x0_scalars * train.x0_lr * extra),
        gate_lr=_six_digits(gates * train.gate_lr * extra),
        weight_decay=_six_digits(decay),
    )


def sft_rates(pretrain: Rates, lr_scale: float) -> Rates:
    """Fine-tuning's peak rates: all of pretraining's times `lr_scale`, without decay (FACTS 2.7)."""
    scaled = {name: _six_digits(rate * lr_scale) for name, rate in pretrain.model_dump().items()}
    return Rates(**scaled | {"weight_decay": 0.0})


def _six_digits(value: float) -> float:
    """Enough for a rate; recipes stay readable and do not depend on the last bit of a platform's `pow`."""
    return float(f"{value:.6g}")


# -- schedules --------------------------------------------------------------------------------------------------------


def pretrain_schedule(steps: int) -> Schedule:
    """Warm-up min(40, 2 %), flat, then to 5 % over the last 65 %; momentum .85 -> .97 -> .90 (FACTS 2.4).

    nanochat ramps momentum over 400 steps whatever the horizon. Here the ramp ends after 20 % at the latest, so it
    never meets the way down, which follows the warm-down.
    """
    warmup = min(40, math.ceil(0.02 * steps))
    return Schedule(
        warmup_steps=warmup,
        warmdown_steps=min(round(0.65 * steps), steps - warmup),
        final_lr_fraction=0.05,
        momentum_start=0.85,
        momentum_peak=0.97,
        momentum_end=0.90,
        momentum_ramp_steps=min(400, steps // 5),
    )


def sft_schedule(steps: int) -> Schedule:
    """Flat, then to zero over the last half; momentum .85 -> .95 and stays there (FACTS 2.7).

    nanochat has no warm-up. One per cent, at most 10 steps, costs nothing and lets fresh optimizer moments settle.
    """
    warmup = min(10, steps // 100)
    return Schedule(
        warmup_steps=warmup,
        warmdown_steps=steps // 2,
        final_lr_fraction=0.0,
        momentum_start=0.85,
        momentum_peak=0.95,
        momentum_end=0.95,
        momentum_ramp_steps=min(300, steps // 5),
    )
