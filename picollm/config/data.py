"""Config section `data`."""

from __future__ import annotations

from pydantic import Field

from picollm.config.base import Section


class DataConfig(Section):
    """What pretraining reads."""

    dataset: str = "toy-world"
    """Name of a dataset under `datasets/`; `picollm data list` shows them."""
    buffer_documents: int = Field(default=1000, ge=1)
    """Pieces of documents held while rows are packed; the best fit is looked for among them."""
