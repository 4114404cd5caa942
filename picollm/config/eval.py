"""Config section `eval`."""

from __future__ import annotations

from pydantic import Field

from picollm.config.base import Section


class EvalConfig(Section):
    """What `picollm eval` measures."""

    questions: int = Field(default=100, ge=1)
    """Distinct questions per chat task; all of them where a task has fewer."""
    batch_size: int = Field(default=64, ge=1)
    """Slots of the engine, or rows of a bits-per-byte pass."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in a chat task."""
    bpb_tokens: int | None = Field(default=None, ge=1)
    """Validation tokens the `bpb` suite reads; None reads all."""
