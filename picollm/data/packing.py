"""Documents -> rows of T + 1 tokens, decided by their lengths alone; exactly resumable, equal on any number of ranks.

Every row starts with bos, and every piece of a document in it stands behind a bos of its own. `best_fit` looks for the
longest piece that fits among a buffer of them; where none fits, one is cut to fill the row and its tail goes back to
the buffer, so nothing is thrown away. `documents` makes the same rows, in which attention stays inside pieces. `concat`
takes documents in order. Conversations (`whole`) are never cut; a row's rest is padded and carries no loss.

Letters: T tokens a row predicts, B rows of a batch.
"""

from __future__ import annotations

import bisect
import hashlib
from typing import Any, Literal, NamedTuple

import numpy as np

from picollm.data.mixture import Mixture
from picollm.errors import ConfigError

Packing = Literal["best_fit", "concat", "documents", "whole"]
IGNORED = -1  # target of a position that carries no loss
SHORTEST_PIECE = 8  # tokens; a shorter rest of a row is not worth cutting a piece for when padding is free


class Piece(NamedTuple):
    """Part of a document that waits for a row; sorts by length."""

    size: int
    document: int
    start: int


class Placed(NamedTuple):
    """Part of a document in a row; `ends` where the document ends with it."""

    document: int
    start: int
    size: int
    ends: bool


class RowPacker:
    """An endless stream of packed rows.

    Args:
        documents: what to pack, in the order in which it is drawn.
        length: T.
        bos: id that starts every row and piece.
        seed: of the choice of the piece that starts a row.
        buffer_size: pieces among which the best fit is looked for.
        packing: see the module.
    """

    DRAW = 64  # documents drawn at a time

    def __init__(
        self, documents: Mixture, *, length: int, bos: int, seed: int, buffer_size: int, packing: Packing = "best_fit"
    ) -> None:
        self.documents, self.length, self.bos = documents, length, bos
        self.seed, self.buffer_size, self.packing = seed, buffer_size, packing
        self.row = 0  # rows produced so far
        self.tokens = 0  # tokens of text placed in them
        self.cut_tokens = 0  # of these, in pieces that end before their document or its T-token part does
        self._pieces: list[Piece] = []  # the buffer, sorted
        self._sizes: dict[int, int] = {}  # tokens of the documents in the buffer
        self._forgotten = 0  # row at which documents were let go last

    @property
    def epoch(self) -> float:
        """Passes over the dataset that was drawn most often."""
        return max(self.documents.epochs)

    @property
    def cut_share(self) -> float:
        """Share of the tokens so far that stand in pieces cut to fill a row."""
        return self.cut_tokens / max(1, self.tokens)

    # -- the plan: lengths alone --

    def _fill(self) -> None:
        if self.packing == "concat":
            while not self._pieces:
                document, size = self.documents.draw()
                if size:
                    self._sizes[document] = size
                    self._pieces.append(Piece(size, document, 0))
            return
        while len(self._pieces) < self.buffer_size:
            for _ in range(self.DRAW):
                document, size = self.documents.draw()
                if size:
                    self._sizes[document] = size
                    for start in range(0, size, self.length):
                        bisect.insort(self._pieces, Piece(min(self.length, size - start), document, start))

    def _take(self, room: int, first: bool) -> Piece | None:
        """A piece of at most `room` tokens: any for a row's start (a random one), else the longest that fits."""
        if self.packing != "concat":
            if first:
                key = hashlib.blake2b(f"{self.seed}/{self.row}".encode(), digest_size=8).digest()
                return self._pieces.pop(int.from_bytes(key) % len(self._pieces))
            at = bisect.bisect_right(self._pieces, (room, 1 << 62, 0)) - 1
            if at >= 0:
                return self._pieces.pop(at)
            if self.packing == "whole":
                return None
        size, document, start = self._pieces.pop(0)  # the shortest of those too long, or the next in order
        if size > room:
            bisect.insort(self._pieces, Piece(size - room, document, start + room))
            self.cut_tokens += room
        return Piece(min(size, room), document, start)

    def plan_row(self) -> list[Placed]:
        """The pieces of the next row, in order."""
        self._fill()
        placed: list[Placed] = []
        used = 0
        while used < self.length:
            room = self.length - used  # behind this piece's bos
            if used and self.packing == "whole" and room < SHORTEST_PIECE:
                break
            if not self._pieces:
                if self.packing != "concat":
                    break
                self._fill()
            piece = self._take(room, first=used == 0)
            if piece is None:
                break
            size, document, start = piece
            placed.append(Placed(document, start, size, start + size == self._sizes[document]))
            used += 1 + size
            self.tokens += size
        self.row += 1
        return placed

    # -- rows: the plan with its tokens --

    def gather(self, placed: list[Placed], ids: np.ndarray, mask: np.ndarray) -> None:
        """Write a row: `ids` (T + 1,) and `mask` (T + 1,), whose position i is about predicting token i."""
        ids[:] = self.bos
        mask[:] = False
        at, text_ended = 0, False
        for document, start, size, ends in placed:
            span = slice(at + 1, at + 1 + size)
            self.documents.copy(document, start, ids[span], mask[span])
            # In text the next document's bos is worth predicting where a document really ended before it.
            mask[at] = text_ended
            text_ended = ends and self.packing != "whole"
            at += 1 + size

    def count(self, placed: list[Placed]) -> int:
        """Positions of a row that carry loss."""
        if self.packing == "whole":  # only the conversations' own masks tell
            ids, mask = np.empty(self.length + 1, dtype=np.int32), np.empty(self.length + 1, dtype=bool)
            self.gather(placed, ids, mask)
            return int(mask[1:].sum())
        return sum(piece.size for piece in placed) + sum(piece.ends for piece in placed[:-1])

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids (T + 1,) int32, carries-loss (T + 1,) bool) of the next row."""
        ids, mask = np.empty(self.length + 1, dtype=np.int32), np.empty(self.length + 1, dtype=bool)
        self.gather(self.plan_row(), ids, mask)
        self.forget()
        return ids, mask

    def forget(self) -> None:
        """Let go of documents that are in no piece any more; call it when the rows so far are gathered."""
        if self.row - self._forgotten >= 64:
            self._forgotten = self.row
            held = {piece.document for piece in self._pieces}
            self._sizes = {document: size for document, size in self._sizes.items() if document in held}
            self.documents.keep(held)

    # -- state --

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, as JSON."""
        return {
            "row": self.row, "tokens": self.tokens, "cut_tokens": self.cut_tokens,
            "drawn": self.documents.state(), "pieces": [list(piece) for piece in self._pieces],
            "sizes": [[piece.document, self._sizes[piece.document]] for piece in self._pieces],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; the documents in its buffer are looked up again.

        Raises:
            ConfigError: an older picollm wrote it, which counted documents otherwise.
        """
        if not isinstance(state.get("drawn"), list) or len(state["drawn"]) != self.documents.num_sources:
            raise ConfigError(
                "the checkpoint's place in the data cannot be gone on from",
                cause="another version of picollm wrote it",
                hint="finish the run with that version, or redo the stage: `picollm speedrun --run NAME --force STAGE`",
            )
        self.row, self.tokens, self.cut_tokens = state["row"], state["tokens"], state["cut_tokens"]
        self._pieces = [Piece(*piece) for piece in state["pieces"]]
        self._sizes = dict(state["sizes"])
        self.documents.restore(state["drawn"], self._sizes)


def bounds_of(rows: list[list[Placed]], length: int) -> np.ndarray:
    """Where each piece starts among the tokens of rows laid end to end, then their number: int32."""
    starts = []
    for row, placed in enumerate(rows):
        at = row * length
        for piece in placed:
            starts.append(at)
            at += 1 + piece.size
    return np.array([*starts, len(rows) * length], dtype=np.int32)


class Batches:
    """Batches of one optimizer step for one rank: rows r, r + W, … of the stream.

    Every rank plans all rows and copies the tokens of its own.

    Args:
        rows_per_step: B over all ranks.
        device_batch_size: rows of one forward pass on one rank.
    """

    def __init__(self, packer: RowPacker, *, rows_per_step: int, device_batch_size: int, rank: int, world: int) -> None:
        self.packer, self.rows_per_step, self.device_batch_size = packer, rows_per_step, device_batch_size
        self.rank, self.world = rank, world

    def next_step(self) -> tuple[list[tuple[np.ndarray, ...]], int]:
        """(micro-batches of (inputs (b, T), targets (b, T)) int64, positions with loss over all ranks).

        With `documents` a micro-batch has the bounds of its documents too, see `bounds_of`.
        """
        plans = [self.packer.plan_row() for _ in range(self.rows_per_step)]
        mine = plans[self.rank :: self.world]
        count = sum(map(self.packer.count, plans))
        batches: list[tuple[np.ndarray, ...]] = []
        for at in range(0, len(mine), self.device_batch_size):
            part = mine[at : at + self.device_batch_size]
            ids = np.empty((len(part), self.packer.length + 1), dtype=np.int64)
            mask = np.empty(ids.shape, dtype=bool)
            for row, placed in enumerate(part):
                self.packer.gather(placed, ids[row], mask[row])
            bounds = (bounds_of(part, self.packer.length),) if self.packer.packing == "documents" else ()
            batches.append((ids[:, :-1].copy(), np.where(mask[:, 1:], ids[:, 1:], IGNORED), *bounds))
        self.packer.forget()
        return batches, count
