"""Config section `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from picollm.config.base import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class TrainConfig(Section):
    """Pretraining: horizon, batch and base rates; the plan scales the rates to the real batch and horizon."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; from `ratio` when None."""
    ratio: float = Field(default=12.0, gt=0)
    """Tokens per scaling parameter when neither `steps` nor `target_flops` is given (compute-optimal is about 10.5)."""
    target_flops: float | None = Field(default=None, gt=0)
    """Training FLOPs of the whole run; gives the steps when `steps` is None."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per optimizer step, over all ranks."""
    device_batch_size: int | None = Field(default=None, ge=1)
    """Rows per forward pass on one rank; the rest of the batch is accumulated."""
    dtype: Dtype = "auto"
    """Compute type of the forward and backward pass; master weights are always at least float32."""
    fp8: bool | None = None
    """Products of the large matrices in 8 bits; None decides by GPU and width."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per rank; `OMP_NUM_THREADS`, else physical cores divided by ranks."""
    compile: bool | None = None
    """torch.compile; None means on for GPUs and off for CPUs, where compiling costs more than short runs gain."""
    matrix_lr: float = Field(default=0.02, gt=0)
    """Base rate of Muon for the matrices inside blocks."""
    embedding_lr: float = Field(default=0.3, gt=0)
    """Base rate of AdamW for the token embedding."""
    unembedding_lr: float = Field(default=0.008, gt=0)
    """Base rate of AdamW for the output head."""
    scalar_lr: float = Field(default=0.005, gt=0)
    """Base rate of AdamW for the residual scalars."""
    x0_lr: float = Field(default=0.5, gt=0)
    """Base rate of AdamW for the weights of the embedding in every layer (`full`); a tenth of it in short runs."""
    gate_lr: float = Field(default=0.2, gt=0)
    """Base rate of AdamW for smear and backout (`full`); a tenth of it in short runs."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's denominator in the loss; 0 leaves it out."""
    weight_decay: bool = True
    """Cautious decay of the matrices, as a timescale of the run."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; None aims at about twenty per run, 10 to 1 000 steps apart."""
    checkpoint_minutes: float | None = Field(default=15.0, gt=0)
    """Also save when so many minutes have passed since the last checkpoint; None saves by steps alone."""
    activation_checkpointing: bool | None = None
    """Compute blocks again in backward instead of keeping their activations; None does so where memory is short."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept; the last one of a finished stage always stays."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between validation passes; None means every 250 where there are 1 000 or more, else only at the end."""
    eval_tokens: int = Field(default=131_072, ge=1)
    """Validation tokens of a pass during training; the `bpb` suite reads all of them."""
