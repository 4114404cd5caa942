"""Token sequences -> rows of T + 1 tokens, exactly resumable, equal for any number of ranks.

Every row starts with bos. Text longer than a row is cut into pieces of T tokens, each behind a bos of its own, and
nothing is thrown away: when no piece fits a row's rest, one is cut to fill it and its tail goes back to the buffer.
Conversations are never cut; a row's rest is padded and carries no loss.

Letters: T tokens a row predicts, B rows of a batch.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from picollm.errors import ConfigError

IGNORED = -1  # target of a position that carries no loss
SHORTEST_PIECE = 8  # tokens; a shorter rest of a row is not worth cutting a piece for when padding is free


@dataclass(frozen=True)
class Encoded:
    """One document or conversation: its tokens behind the bos and, for conversations, which of them carry loss."""

    ids: np.ndarray  # (n,) int32, without bos
    mask: np.ndarray | None = None  # (n,) bool


# index of documents -> their encodings, in the same order
Encode = Callable[[Sequence[int]], list[Encoded]]


class RowPacker:
    """An endless stream of packed rows over documents in a seeded order, one new permutation per epoch.

    Args:
        encode: tokenises documents by index; called with batches of them.
        num_documents: how many there are.
        length: T.
        bos: id that starts every row and piece.
        seed: of the order.
        buffer_size: pieces among which the best fit is looked for.
        cut: pieces may be cut (text) or not (conversations).
    """

    ENCODE_BATCH = 64

    def __init__(
        self, encode: Encode, num_documents: int, *, length: int, bos: int, seed: int, buffer_size: int, cut: bool
    ) -> None:
        if num_documents < 1:
            raise ConfigError("there is nothing to train on", cause="the dataset has no documents")
        self.encode, self.num_documents, self.length, self.bos = encode, num_documents, length, bos
        self.seed, self.buffer_size, self.cut = seed, buffer_size, cut
        self.drawn = 0  # documents taken from the order so far
        self.row = 0  # rows produced so far
        self.tokens = 0  # tokens of text placed in them
        self._pieces: list[tuple[int, int, int]] = []  # (tokens, document, start), sorted; the buffer
        self._texts: dict[int, Encoded] = {}  # encodings of the documents in the buffer
        self._order: tuple[int, list[int]] | None = None  # (epoch, permutation)

    @property
    def epoch(self) -> float:
        """Passes over the documents, by what has been drawn."""
        return self.drawn / self.num_documents

    # -- order and buffer --

    def _document_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_documents)
        if self._order is None or self._order[0] != epoch:
            order = list(range(self.num_documents))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]

    def _fill(self) -> None:
        empty_epochs_from = self.drawn
        while len(self._pieces) < self.buffer_size:
            wanted = [self._document_at(self.drawn + i) for i in range(self.ENCODE_BATCH)]
            for document, encoded in zip(wanted, self.encode(wanted), strict=True):
                self.drawn += 1
                n = len(encoded.ids)
                if not self.cut and n > self.length:
                    encoded = Encoded(encoded.ids[: self.length], encoded.mask[: self.length])
                    n = self.length
                if n == 0 or (encoded.mask is not None and not encoded.mask.any()):
                    continue
                self._texts[document] = encoded
                for start in range(0, n, self.length):
                    bisect.insort(self._pieces, (min(self.length, n - start), document, start))
            if not self._pieces and self.drawn - empty_epochs_from > self.num_documents:
                raise ConfigError("there is nothing to train on", cause="no document has a token that carries loss")

    def _take(self, room: int, first: bool) -> tuple[int, int, int] | None:
        """A piece of at most `room` tokens: any for a row's start (a random one), else the longest that fits."""
        if first:
            key = hashlib.blake2b(f"{self.seed}/{self.row}".encode(), digest_size=8).digest()
            return self._pieces.pop(int.from_bytes(key) % len(self._pieces))
        at = bisect.bisect_right(self._pieces, (room, self.num_documents, 0)) - 1
        if at >= 0:
            return self._pieces.pop(at)
        if not self.cut:
            return None
        size, document, start = self._pieces.pop(0)  # the shortest of those too long
        bisect.insort(self._pieces, (size - room, document, start + room))
        return (room, document, start)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids (T + 1,) int32, carries-loss (T + 1,) bool); the mask of position i is about predicting it."""
        self._fill()
        width = self.length + 1
        ids = np.full(width, self.bos, dtype=np.int32)
        mask = np.zeros(width, dtype=bool)
        used = 0
        ended = False
        while used < width - 1 and self._pieces:
            room = width - used - 1  # after this piece's bos
            if used and not self.cut and room < SHORTEST_PIECE:
                break
            piece = self._take(room, first=used == 0)
            if piece is None:
                break
            size, document, start = piece
            encoded = self._texts[document]
            span = slice(used + 1, used + 1 + size)
            ids[span] = encoded.ids[start : start + size]
            mask[span] = True if encoded.mask is None else encoded.mask[start : start + size]
            # In text the next document's bos is worth predicting where a document really ended before it.
            mask[used] = encoded.mask is None and ended
            ended = start + size == len(encoded.ids)
            used += 1 + size
            self.tokens += size
        self.row += 1
        if self.row % 64 == 0:
            self._forget()
        return ids, mask

    def _forget(self) -> None:
        held = {document for _, document, _ in self._pieces}
        self._texts = {document: text for document, text in self._texts.items() if document in held}

    # -- state --

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, as JSON."""
        return {"drawn": self.drawn, "row": self.row, "tokens": self.tokens, "pieces": [list(p) for p in self._pieces]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; the documents in its buffer are encoded again."""
        self.drawn, self.row, self.tokens = state["drawn"], state["row"], state["tokens"]
        self._pieces = [(size, document, start) for size, document, start in state["pieces"]]
        documents = sorted({document for _, document, _ in self._pieces})
        self._texts = {}
        for at in range(0, len(documents), self.ENCODE_BATCH):
            part = documents[at : at + self.ENCODE_BATCH]
            self._texts.update(zip(part, self.encode(part), strict=True))


class Batches:
    """Batches of one optimizer step for one rank: rows r, r + W, … of the stream.

    Args:
        rows_per_step: B over all ranks.
        device_batch_size: rows of one forward pass on one rank.
    """

    def __init__(self, packer: RowPacker, *, rows_per_step: int, device_batch_size: int, rank: int, world: int) -> None:
        self.packer, self.rows_per_step, self.device_batch_size = packer, rows_per_step, device_batch_size
        self.rank, self.world = rank, world

    def next_step(self) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
        """(micro-batches of (inputs (b, T), targets (b, T)) int64, positions with loss over all ranks)."""
        rows = [self.packer.next_row() for _ in range(self.rows_per_step)]
        count = sum(int(mask[1:].sum()) for _, mask in rows)
        mine = rows[self.rank :: self.world]
        batches = []
        for at in range(0, len(mine), self.device_batch_size):
            part = mine[at : at + self.device_batch_size]
            ids = np.stack([ids for ids, _ in part]).astype(np.int64)
            mask = np.stack([mask for _, mask in part])
            batches.append((ids[:, :-1], np.where(mask[:, 1:], ids[:, 1:], IGNORED)))
        return batches, count
