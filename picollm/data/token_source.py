"""Where the tokens of documents come from: tokenised as they are drawn, or read from the token cache.

The packer asks for lengths when it draws documents and for tokens when it fills rows, so both give the same rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """One document or conversation: its tokens behind the bos and, for conversations, which of them carry loss."""

    ids: np.ndarray  # (n,) int32, without bos
    mask: np.ndarray | None = None  # (n,) bool


# index of documents -> their encodings, in the same order
Encode = Callable[[Sequence[int]], list[Encoded]]


class TokenSource(Protocol):
    """The documents of one dataset as tokens."""

    num_documents: int

    def lengths(self, documents: Sequence[int]) -> list[int]:
        """Tokens of each document behind its bos; 0 for one that has nothing to learn from."""

    def copy(self, document: int, start: int, ids: np.ndarray, mask: np.ndarray) -> None:
        """Fill `ids` (n,) with the tokens from `start` on, and `mask` (n,) with which of them carry loss.

        The document was asked for by `lengths` and has not been dropped by `keep` since.
        """

    def keep(self, documents: Collection[int]) -> None:
        """Documents that may still be copied; all others can be forgotten."""


class LiveTokens:
    """Documents tokenised when their lengths are asked for, kept until they are dropped.

    Args:
        encode: tokenises documents by index; called with batches of them.
        limit: tokens of a document beyond so many are cut away (conversations, which are never split over rows).
    """

    def __init__(self, encode: Encode, num_documents: int, *, limit: int | None = None) -> None:
        self.encode, self.num_documents, self.limit = encode, num_documents, limit
        self._held: dict[int, Encoded] = {}

    def lengths(self, documents: Sequence[int]) -> list[int]:
        found = []
        for document, encoded in zip(documents, self.encode(documents), strict=True):
            ids, mask = encoded.ids[: self.limit], encoded.mask
            if mask is not None:
                mask = mask[: self.limit]
            learnable = len(ids) if mask is None or mask.any() else 0
            if learnable:
                self._held[document] = Encoded(ids, mask)
            found.append(learnable)
        return found

    def copy(self, document: int, start: int, ids: np.ndarray, mask: np.ndarray) -> None:
        encoded = self._held[document]
        end = start + len(ids)
        ids[:] = encoded.ids[start:end]
        mask[:] = True if encoded.mask is None else encoded.mask[start:end]

    def keep(self, documents: Collection[int]) -> None:
        self._held = {document: held for document, held in self._held.items() if document in documents}


class CachedTokens:
    """Documents that were tokenised before: memory-mapped parts of the token cache (`picollm.tokenizer.cache`).

    Args:
        parts: per part its tokens and the offsets of its documents in them, one more than it has documents.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self._parts = parts
        self._firsts = list(accumulate((len(offsets) - 1 for _, offsets in parts), initial=0))
        self.num_documents = self._firsts.pop()

    def _locate(self, document: int) -> tuple[np.ndarray, int, int]:
        """(tokens of its part, where the document starts in them, where it ends)."""
        number = bisect_right(self._firsts, document) - 1
        tokens, offsets = self._parts[number]
        inside = document - self._firsts[number]
        return tokens, int(offsets[inside]), int(offsets[inside + 1])

    def lengths(self, documents: Sequence[int]) -> list[int]:
        return [end - start for _, start, end in map(self._locate, documents)]

    def copy(self, document: int, start: int, ids: np.ndarray, mask: np.ndarray) -> None:
        tokens, first, _ = self._locate(document)
        ids[:] = tokens[first + start : first + start + len(ids)]
        mask[:] = True

    def keep(self, documents: Collection[int]) -> None:
        """The operating system's page cache decides."""
