"""Config section `sft`."""

from __future__ import annotations

from pydantic import Field

from picollm.config.base import Section


class SftSource(Section):
    """One part of the fine-tuning mixture."""

    dataset: str
    """Name of a dataset of conversations."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the tokens, relative to the other parts."""


class SftConfig(Section):
    """Fine-tuning on conversations. Row length, compute type and base rates are those of pretraining."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None means one pass over the conversations."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per step; None takes over pretraining's."""
    lr_scale: float = Field(default=0.8, gt=0)
    """Rates relative to those of pretraining."""
    mix: tuple[SftSource, ...] = ()
    """Datasets of conversations; empty means the toy world's."""
