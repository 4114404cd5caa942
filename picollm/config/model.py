"""Config section `model`, and the architecture that it becomes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from picollm.config.base import Section

# Far above what anybody trains here; caches and tables are as long, so a torn or hostile value must not pass.
MAX_POSITIONS = 2**20


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 64, which matrix units like."""
    return -(-vocab_size // 64) * 64


# The features behind a name; each may also be set alone. Code reads features, never names.
FEATURES: dict[str, dict[str, Any]] = {
    "portable": {
        "window_pattern": "L",
        "logit_softcap": None,
        "value_embeddings": False,
        "x0_scalars": False,
        "smear": False,
        "backout": False,
    },
    "full": {
        "window_pattern": "SSSL",
        "logit_softcap": 15.0,
        "value_embeddings": True,
        "x0_scalars": True,
        "smear": True,
        "backout": True,
    },
}
# Channels of a normed embedding that the gates of value embeddings and of smear read.
GATE_CHANNELS = 12
SMEAR_CHANNELS = 24
AttentionBackend = Literal["matmul", "sdpa", "cudnn", "flash", "varlen", "fa3", "flex"]


def short_window(length: int) -> int:
    """Keys behind a query in a short-window layer: a quarter of the row, rounded up to a multiple of 128."""
    return -(-length // 512) * 128


class ModelConfig(Section):
    """The operator's dials for the model; what is None follows from `depth` or from `arch`."""

    arch: Literal["portable", "full"] = "portable"
    """Set of features. `portable` exports to stock runtimes; `full` learns more from a token and does not."""
    depth: int = Field(default=12, ge=1, le=128)
    """The one dial: layers, width, batch, rates and steps follow from it."""
    hidden_size: int | None = Field(default=None, ge=16)
    """Width; from depth: 64 a layer, rounded up to 128."""
    num_hidden_layers: int | None = Field(default=None, ge=1)
    """Layers; from depth."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Query heads; from width and head size."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key and value heads (grouped queries); as many as query heads unless told."""
    head_dim: int | None = Field(default=None, ge=8)
    """Head size; width / heads when the heads are given, else 128, or 64 when the width is under 512."""
    intermediate_size: int | None = Field(default=None, ge=16)
    """Width inside the MLP; four times the width."""
    max_position_embeddings: int = Field(default=2048, ge=16, le=MAX_POSITIONS)
    """Tokens in a row, T."""
    rope_theta: float = Field(default=100_000.0, gt=0)
    """Base of the rotary position embedding."""
    window_pattern: str | None = Field(default=None, pattern="^[SL]+$")
    """Attention of the layers, repeated: L sees all, S a quarter of the row; the last layer always sees all."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Logits z become c·tanh(z / c)."""
    value_embeddings: bool | None = None
    """Every second layer adds an embedding of the token to its values, through a gate per head."""
    x0_scalars: bool | None = None
    """Every layer mixes in the embedding with a learned weight."""
    smear: bool | None = None
    """A token's embedding takes up some of the one before it."""
    backout: bool | None = None
    """A share of the stream of the middle layer is taken out again before the head."""
    attention: Literal["auto", AttentionBackend] = "auto"
    """Kernel for attention; `auto` chooses by device, dtype, T, windows and what is installed."""


class Architecture(Section):
    """A model's shape with nothing left to derive; stored in recipes and checkpoints, read by `model/gpt.py`."""

    arch: Literal["portable", "full"]
    """Name of the set of features; code reads the features, not the name."""
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    intermediate_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    """Tokens of the tokenizer; weights have `padded_vocab_size` rows."""
    max_position_embeddings: int = Field(ge=1, le=MAX_POSITIONS)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    qk_scale: float = Field(default=1.2, gt=0)
    """Queries and keys are multiplied by this after their norm."""
    sliding_window: int | None = Field(default=None, ge=1)
    """Keys that a query of a short-window layer sees behind itself; None where no layer has one."""
    window_pattern: str = Field(default="L", pattern="^[SL]+$")
    """Which layers have it (S), repeated over the depth; the last layer never has."""
    final_logit_softcapping: float | None = Field(default=None, gt=0)
    value_embeddings: bool = False
    x0_scalars: bool = False
    smear: bool = False
    backout: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads}): choose one that divides it"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim ({self.head_dim}) must be even: rotation works on pairs")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head."""
        return padded_vocab_size(self.vocab_size)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer: keys visible behind a query, None for all of them."""
        last = self.num_hidden_layers - 1
        pattern = self.window_pattern
        return tuple(
            self.sliding_window if i < last and pattern[i % len(pattern)] == "S" else None for i in range(last + 1)
        )

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Layers with a value embedding: every second one, counted so that the last has one."""
        last = self.num_hidden_layers - 1
        return tuple(i for i in range(last + 1) if i % 2 == last % 2) if self.value_embeddings else ()
