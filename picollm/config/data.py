"""Config section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from picollm.config.base import Section


class DataConfig(Section):
    """What pretraining reads."""

    dataset: str = "toy-world"
    """Name of a dataset under `datasets/`; `picollm data list` shows them."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Datasets by name with their shares of the tokens, relative to one another; where there are any, they take the
    place of `dataset`."""
    packing: Literal["best_fit", "concat", "documents"] = "best_fit"
    """How rows are filled: with the longest pieces that fit; the same, with attention kept inside documents; or with
    documents one after the other."""
    cache_gib: float = Field(default=64.0, ge=0)
    """Room for the tokens of datasets on disk, all caches together, so that text is tokenised once; 0 uses none."""
    buffer_documents: int = Field(default=1000, ge=1)
    """Pieces of documents held while rows are packed; the best fit is looked for among them."""

    @property
    def sources(self) -> list[tuple[str, float]]:
        """What pretraining reads: datasets with their weights, by name."""
        return sorted(self.mix.items()) or [(self.dataset, 1.0)]
