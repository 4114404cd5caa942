"""One stream of documents over several datasets, in exact shares of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from picollm.data.order import DocumentOrder
from picollm.data.token_source import TokenSource
from picollm.errors import ConfigError

# Documents whose lengths are asked for at once: tokenizers and disks like batches.
LOOKAHEAD = 64


class _Part:
    """One dataset of the mixture and how far it has been drawn."""

    def __init__(self, source: TokenSource, order: DocumentOrder, weight: float, first: int) -> None:
        self.source, self.order, self.weight, self.first = source, order, weight, first
        self.drawn = 0  # documents
        self.tokens = 0
        self.ahead: deque[tuple[int, int]] = deque()  # (document, tokens) asked for and not drawn

    def look_ahead(self) -> None:
        start = self.drawn + len(self.ahead)
        documents = [self.order[start + i] for i in range(LOOKAHEAD)]
        self.ahead.extend(zip(documents, self.source.lengths(documents), strict=True))


class Mixture:
    """Documents of several datasets, each in its own seeded order; the one furthest behind its share comes next.

    Shares count tokens, so a dataset of long documents gets no more than its weight. Documents have one number over
    all datasets: that of the dataset's first document plus their own.

    Args:
        sources: the datasets, none of them empty.
        weights: their shares, relative to one another.
        seed: of the orders.

    Raises:
        ConfigError: there is no document.
    """

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[float], seed: int) -> None:
        if not sources or not all(source.num_documents for source in sources):
            raise ConfigError("there is nothing to train on", cause="the dataset has no documents")
        firsts = list(accumulate((source.num_documents for source in sources), initial=0))
        self._firsts = firsts[:-1]
        self._parts = [
            # A single dataset keeps the order that it had before there were mixtures.
            _Part(source, DocumentOrder(source.num_documents, seed if i == 0 else f"{seed}/{i}"), weight, first)
            for i, (source, weight, first) in enumerate(zip(sources, weights, firsts, strict=False))
        ]

    @property
    def num_documents(self) -> int:
        return sum(part.source.num_documents for part in self._parts)

    @property
    def num_sources(self) -> int:
        return len(self._parts)

    @property
    def epochs(self) -> list[float]:
        """Passes over each dataset, by documents drawn."""
        return [part.drawn / part.source.num_documents for part in self._parts]

    @property
    def shares(self) -> list[float]:
        """Each dataset's share of the tokens drawn so far."""
        total = max(1, sum(part.tokens for part in self._parts))
        return [part.tokens / total for part in self._parts]

    def draw(self) -> tuple[int, int]:
        """The next document and its tokens; 0 of them where it has nothing to learn from.

        Raises:
            ConfigError: a dataset was read whole and has no token.
        """
        part = min(self._parts, key=lambda p: p.tokens / p.weight) if len(self._parts) > 1 else self._parts[0]
        if not part.ahead:
            part.look_ahead()
        document, tokens = part.ahead.popleft()
        part.drawn += 1
        part.tokens += tokens
        if not part.tokens and part.drawn > part.source.num_documents:
            raise ConfigError("there is nothing to train on", cause="no document has a token that carries loss")
        return part.first + document, tokens

    def _locate(self, document: int) -> tuple[_Part, int]:
        part = self._parts[bisect_right(self._firsts, document) - 1]
        return part, document - part.first

    def copy(self, document: int, start: int, ids: np.ndarray, mask: np.ndarray) -> None:
        """As `TokenSource.copy`."""
        part, own = self._locate(document)
        part.source.copy(own, start, ids, mask)

    def keep(self, documents: Collection[int]) -> None:
        """As `TokenSource.keep`; what was looked at ahead stays too."""
        for part in self._parts:
            end = part.first + part.source.num_documents
            held = {document - part.first for document in documents if part.first <= document < end}
            part.source.keep(held | {document for document, _ in part.ahead})

    def state(self) -> list[list[int]]:
        """(documents, tokens) drawn from each dataset, as JSON."""
        return [[part.drawn, part.tokens] for part in self._parts]

    def restore(self, state: Sequence[Sequence[int]], held: Collection[int]) -> None:
        """Go on from what `state` gave, with the documents `held` ready to be copied."""
        for part, (drawn, tokens) in zip(self._parts, state, strict=True):
            part.drawn, part.tokens = drawn, tokens
            part.ahead.clear()
        wanted: dict[int, list[int]] = {}
        for document in sorted(held):
            part, own = self._locate(document)
            wanted.setdefault(part.first, []).append(own)
        for part in self._parts:
            documents = wanted.get(part.first, [])
            for at in range(0, len(documents), LOOKAHEAD):
                part.source.lengths(documents[at : at + LOOKAHEAD])

    def describe(self) -> list[dict[str, Any]]:
        """What the record of a run says about each dataset: documents and tokens drawn, epochs, true share."""
        return [
            {"documents": part.drawn, "tokens": part.tokens, "epochs": round(epoch, 4), "share": round(share, 6)}
            for part, epoch, share in zip(self._parts, self.epochs, self.shares, strict=True)
        ]
