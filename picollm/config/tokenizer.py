"""Config section `tokenizer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from picollm.config.base import Section


class TokenizerConfig(Section):
    """How the tokenizer is trained."""

    vocab_size: int = Field(default=32_768, ge=280, le=65_536)
    """Tokens in all, the nine specials included."""
    digits: Literal[1, 2] = 1
    """Digits that may stand in one token. 2 gives up to 0.004 bits per byte less, and a model that GGUF cannot hold."""
    max_chars: int = Field(default=200_000_000, ge=1_000)
    """Characters of training text it looks at, in the dataset's order."""
    doc_chars: int = Field(default=10_000, ge=100)
    """Characters taken from one document, so that a few long ones do not decide the vocabulary."""
