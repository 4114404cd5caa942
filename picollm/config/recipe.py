"""What a training worker reads: the two halves of its stage's `config.json`, with every number decided."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from picollm.config.base import Section
from picollm.config.model import Architecture, AttentionBackend

ComputeDtype = Literal["float32", "bfloat16", "float16", "float64"]


class Rates(Section):
    """Peak learning rates and decay, after all scaling."""

    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    value_embedding_lr: float = 0.0
    x0_lr: float = 0.0
    gate_lr: float = 0.0
    """Smear and backout."""
    weight_decay: float
    """Lambda of the cautious decay at the start; falls to 0 along a cosine."""


class Schedule(Section):
    """Shape of the rates over the run, as steps."""

    warmup_steps: int = Field(ge=0)
    warmdown_steps: int = Field(ge=0)
    final_lr_fraction: float = Field(ge=0, le=1)
    momentum_start: float
    momentum_peak: float
    momentum_end: float
    momentum_ramp_steps: int = Field(ge=0)


class Source(Section):
    """A dataset as it was when the recipe was written."""

    dataset: str
    sha256: str
    """Hash of its `dataset.json`, which pins every file."""
    weight: float = 1.0


class TrainRecipe(Section):
    """What is trained: hashed, and immutable once the stage has a checkpoint."""

    stage: Literal["pretrain", "sft"]
    seed: int
    model: Architecture
    dtype: ComputeDtype
    dtype_reason: str
    fp8: bool = False
    fp8_reason: str = ""
    z_loss: float = Field(default=0.0, ge=0)
    steps: int = Field(ge=1)
    batch_tokens: int = Field(ge=1)
    rates: Rates
    schedule: Schedule
    data: tuple[Source, ...]
    packing: Literal["best_fit", "concat", "documents", "whole"] = "best_fit"
    """`whole` is how conversations are packed."""
    buffer_documents: int = Field(ge=1)
    tokenizer_sha256: str
    init_from: str | None = None
    """sha256 of the weights it starts from; None starts from random ones."""


class TrainRuntime(Section):
    """How it is executed: free to change on resume."""

    ranks: int = Field(ge=1)
    threads: int = Field(ge=1)
    device_batch_size: int = Field(ge=1)
    attention: Literal["auto", AttentionBackend]
    compile: bool
    activation_checkpointing: bool = False
    checkpoint_every: int = Field(ge=1)
    checkpoint_minutes: float | None = None
    keep_last: int = Field(ge=1)
    eval_every: int | None
    """Steps between validation passes; None validates only at the end."""
    eval_tokens: int = Field(ge=1)
    cache_gib: float = Field(default=0.0, ge=0)
    """Room for the token cache; 0 for none, as where conversations are read."""


class EvalRecipe(Section):
    """One suite on one checkpoint."""

    stage: Literal["eval"] = "eval"
    suite: Literal["bpb", "samples", "chat"]
    source: str
    """Training stage whose model is scored."""
    checkpoint_sha256: str
    step: int
    data: tuple[Source, ...]
    """Datasets whose validation splits `bpb` reads."""
    questions: int
    max_new_tokens: int
    bpb_tokens: int | None
    seed: int


class EvalRuntime(Section):
    """How it is executed."""

    ranks: Literal[1] = 1
    threads: int = Field(ge=1)
    batch_size: int = Field(ge=1)
