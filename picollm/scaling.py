"""Depth and a token budget -> shape, parameters, FLOPs, batch, rates and schedules. Pure functions, no machine.

Letters: L layers, C hidden size, H query heads, K key/value heads, D head size, T tokens in a row, V vocabulary,
B tokens per step, N steps, P scaling parameters. Formulas are nanochat's (commit 92d63d4, MIT) unless said; its
reference point is depth 12 at B = 2^19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from picollm.config.model import FEATURES, Architecture, padded_vocab_size, short_window
from picollm.config.recipe import Rates, Schedule
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError

REFERENCE_DEPTH = 12
REFERENCE_HIDDEN_SIZE = 768
REFERENCE_BATCH_TOKENS = 2**19
# Tokens per parameter at which the base rates were tuned; stands in for the ratio when steps are given.
REFERENCE_RATIO = 12.0
BATCH_EXPONENT = 0.383
# Below this the square root starves short runs on small batches: at 4 096 tokens a step it would be 0.09.
MIN_BATCH_LR_FACTOR = 0.8
# Matrix rate x decay x steps is 1 / 0.0709 at ratio 12 for every depth of nanochat's rule.
DECAY_TIMESCALE = 0.0709


# -- shape ------------------------------------------------------------------------------------------------------------


def hidden_size_of(depth: int) -> int:
    """Width from depth: 64 a layer, rounded up to a multiple of 128."""
    return -(-64 * depth // 128) * 128


def architecture(config: RunConfig, vocab_size: int | None = None) -> Architecture:
    """The model's shape with nothing left to derive.

    Args:
        vocab_size: tokens of the tokenizer that was trained; None takes the config's, which it may fall short of.

    Raises:
        ConfigError: widths and heads that do not divide, with keys, values and a fix.
    """
    model = config.model
    hidden = model.hidden_size or hidden_size_of(model.depth)
    # Heads of 64 keep at least two of them in narrow models.
    head_dim = model.head_dim or (128 if hidden >= 512 else 64)
    if model.num_attention_heads and not model.head_dim:
        if hidden % model.num_attention_heads:
            raise ConfigError(
                f"`model.hidden_size` ({hidden}) is not a multiple of `model.num_attention_heads` "
                f"({model.num_attention_heads})",
                cause="every head gets an equal share of the width",
                hint=f"use `--set model.num_attention_heads={_nearest_divisor(hidden, model.num_attention_heads)}`",
            )
        head_dim = hidden // model.num_attention_heads
    if not model.num_attention_heads and hidden % head_dim:
        raise ConfigError(
            f"`model.hidden_size` ({hidden}) is not a multiple of `model.head_dim` ({head_dim})",
            cause="the number of heads is width divided by head size",
            hint=f"use `--set model.hidden_size={max(1, round(hidden / head_dim)) * head_dim}`",
        )
    heads = model.num_attention_heads or hidden // head_dim
    kv_heads = model.num_key_value_heads or heads
    if heads % kv_heads:
        raise ConfigError(
            f"`model.num_attention_heads` ({heads}) is not a multiple of `model.num_key_value_heads` ({kv_heads})",
            cause="each key/value head serves the same number of query heads",
            hint=f"use `--set model.num_key_value_heads={_nearest_divisor(heads, kv_heads)}`",
        )
    if head_dim % 2:
        raise ConfigError(
            f"`model.head_dim` ({head_dim}) is odd",
            cause="the rotary embedding turns pairs of channels",
            hint=f"use `--set model.head_dim={head_dim + 1}`",
        )
    features = {
        name: default if (value := getattr(model, name)) is None else value
        for name, default in FEATURES[model.arch].items()
    }
    windows = "S" in features["window_pattern"]
    return Architecture(
        arch=model.arch,
        hidden_size=hidden,
        num_hidden_layers=model.num_hidden_layers or model.depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=model.intermediate_size or 4 * hidden,
        vocab_size=vocab_size or config.tokenizer.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_theta=model.rope_theta,
        window_pattern=features["window_pattern"],
        sliding_window=short_window(model.max_position_embeddings) if windows else None,
        final_logit_softcapping=features["logit_softcap"],
        value_embeddings=features["value_embeddings"],
        x0_scalars=features["x0_scalars"],
        smear=features["smear"],
        backout=features["backout"],
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


@dataclass(frozen=True)
class Params:
    """Stored parameters by role; padding rows of the vocabulary are stored, so they count."""

    embedding: int
    head: int
    matrices: int
    scalars: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.scalars

    @property
    def scaling(self) -> int:
        """P of the scaling rules: what multiplies, so matrices and head (12·L·C² + V·C for plain shapes)."""
        return self.matrices + self.head


def num_params(arch: Architecture) -> Params:
    """Count parameters from the shape."""
    c, q, kv = arch.hidden_size, arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    block = 2 * c * q + 2 * c * kv + 2 * c * arch.intermediate_size
    table = arch.padded_vocab_size * c
    layers = arch.num_hidden_layers
    return Params(embedding=table, head=table, matrices=layers * block, scalars=layers)


def flops_per_token(arch: Architecture) -> float:
    """Forward and backward FLOPs of one token, nanochat's convention: 6·P + L·12·H·D·T.

    Attention counts the whole square, so model FLOPs utilisation compares with published figures.
    """
    return 6.0 * num_params(arch).scaling + _attention_flops(arch, arch.max_position_embeddings)


def causal_flops_per_token(arch: Architecture) -> float:
    """The same with the keys a query really sees, (T + 1) / 2 on average (GPU.md 1.1, "causal")."""
    return 6.0 * num_params(arch).scaling + _attention_flops(arch, (arch.max_position_embeddings + 1) / 2)


def _attention_flops(arch: Architecture, keys: float) -> float:
    return 12.0 * arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim * keys


# -- batch and rates --------------------------------------------------------------------------------------------------


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
    """Steps and batch of pretraining; steps win over the ratio.

    An automatic batch is a power of two, moved to the nearest multiple of T.

    Raises:
        ConfigError: `train.batch_tokens` is not a multiple of T.
    """
    train, row = config.train, arch.max_position_embeddings
    scaling = num_params(arch).scaling
    batch = train.batch_tokens
    if batch is not None:
        check_batch("train.batch_tokens", batch, row)
    elif train.steps is not None:
        batch = auto_batch_tokens_for_steps(train.steps, reference_tokens(REFERENCE_RATIO, arch.vocab_size))
    else:
        batch = auto_batch_tokens(train.ratio * scaling, reference_tokens(train.ratio, arch.vocab_size))
    batch = max(1, round(batch / row)) * row
    steps = train.steps or max(1, int(train.ratio * scaling // batch))
    return Horizon(steps, batch, steps * batch / scaling)


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


def _six_digits(value: float) -> float:
    """Enough for a rate; recipes stay readable and do not depend on the last bit of a platform's `pow`."""
    return float(f"{value:.6g}")


def pretrain_rates(config: RunConfig, arch: Architecture, horizon: Horizon) -> Rates:
    """Peak rates and decay after all scaling."""
    train = config.train
    every = batch_lr_factor(horizon.batch_tokens)
    adam = every * width_lr_factor(arch.hidden_size)
    matrix_lr = train.matrix_lr * every
    ratio = REFERENCE_RATIO if train.steps is not None else train.ratio
    return Rates(
        matrix_lr=_six_digits(matrix_lr),
        embedding_lr=_six_digits(train.embedding_lr * adam),
        unembedding_lr=_six_digits(train.unembedding_lr * adam),
        scalar_lr=_six_digits(train.scalar_lr * every),
        weight_decay=_six_digits(weight_decay(horizon.steps, matrix_lr, ratio)) if train.weight_decay else 0.0,
    )


def sft_rates(pretrain: Rates, lr_scale: float) -> Rates:
    """Fine-tuning's peak rates: pretraining's times `lr_scale`, without decay (FACTS 2.7)."""
    return Rates(
        matrix_lr=_six_digits(pretrain.matrix_lr * lr_scale),
        embedding_lr=_six_digits(pretrain.embedding_lr * lr_scale),
        unembedding_lr=_six_digits(pretrain.unembedding_lr * lr_scale),
        scalar_lr=_six_digits(pretrain.scalar_lr * lr_scale),
        weight_decay=0.0,
    )


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
