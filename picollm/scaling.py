"""Depth -> shape, parameters and FLOPs. Pure functions, no machine; `rates.py` goes on from here.

Letters: L layers, C hidden size, H query heads, K key/value heads, D head size, T tokens in a row, V vocabulary,
P scaling parameters. Formulas are nanochat's (commit 92d63d4, MIT) unless said.
"""

from __future__ import annotations

from dataclasses import dataclass

from picollm.config.model import FEATURES, GATE_CHANNELS, SMEAR_CHANNELS, Architecture, short_window
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError

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
    # A window as long as the row hides nothing; without it the plain causal kernels serve every layer.
    row = model.max_position_embeddings
    window = short_window(row) if "S" in features["window_pattern"] and short_window(row) < row else None
    return Architecture(
        arch=model.arch,
        hidden_size=hidden,
        num_hidden_layers=model.num_hidden_layers or model.depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=model.intermediate_size or 4 * hidden,
        vocab_size=vocab_size or config.tokenizer.vocab_size,
        max_position_embeddings=row,
        rope_theta=model.rope_theta,
        window_pattern=features["window_pattern"],
        sliding_window=window,
        final_logit_softcapping=features["logit_softcap"],
        value_embeddings=features["value_embeddings"],
        x0_scalars=features["x0_scalars"],
        smear=features["smear"],
        backout=features["backout"],
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


# -- parameters and FLOPs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Params:
    """Stored parameters by role; padding rows of the vocabulary are stored, so they count.

    Attributes:
        matrices: the projections of attention and MLP, all layers.
        gates: of value embeddings and smear.
        scalars: residual and embedding weights of every layer, strengths of smear and backout.
    """

    embedding: int
    head: int
    matrices: int
    value_embeddings: int
    gates: int
    scalars: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.value_embeddings + self.gates + self.scalars

    @property
    def scaling(self) -> int:
        """P of the scaling rules: what multiplies, so matrices and head (12·L·C² + V·C for plain shapes)."""
        return self.matrices + self.head


def num_params(arch: Architecture) -> Params:
    """Count parameters from the shape."""
    c, q, kv = arch.hidden_size, arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    layers, with_values = arch.num_hidden_layers, len(arch.value_embedding_layers)
    table = arch.padded_vocab_size * c
    gates = with_values * arch.num_key_value_heads * GATE_CHANNELS + arch.smear * min(SMEAR_CHANNELS, c)
    return Params(
        embedding=table,
        head=table,
        matrices=layers * (2 * c * q + 2 * c * kv + 2 * c * arch.intermediate_size),
        value_embeddings=with_values * arch.padded_vocab_size * kv,
        gates=gates,
        scalars=layers * (1 + arch.x0_scalars) + arch.smear + arch.backout,
    )


def flops_per_token(arch: Architecture) -> float:
    """Forward and backward FLOPs of one token, nanochat's convention: 6·P + 12·H·D·min(window, T) a layer.

    Attention counts every key of the window or row, seen or not, so model FLOPs utilisation compares with published
    figures. Looking up embeddings is no product; gates, norms and scalars are too small to count.
    """
    row = arch.max_position_embeddings
    return 6.0 * num_params(arch).scaling + _attention_flops(arch, [min(window or row, row) for window in arch.windows])


def causal_flops_per_token(arch: Architecture) -> float:
    """The same with the keys a query really sees: (T + 1) / 2 on average, fewer in a window (GPU.md 1.1, "causal")."""
    row = arch.max_position_embeddings
    return 6.0 * num_params(arch).scaling + _attention_flops(arch, [_seen(window, row) for window in arch.windows])


def _seen(window: int | None, row: int) -> float:
    """Mean number of keys seen by the queries of a row: themselves and up to `window` behind."""
    most = row if window is None else min(window + 1, row)
    return most - most * (most - 1) / (2 * row)


def _attention_flops(arch: Architecture, keys: list[float]) -> float:
    return 12.0 * arch.num_attention_heads * arch.head_dim * sum(keys)
