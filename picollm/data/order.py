"""The order in which documents are drawn: a pure function of seed and position, a new permutation every epoch."""

from __future__ import annotations

import random

# Up to here one shuffle of everything. Larger datasets are permuted at import (or come shuffled), so it is enough to
# permute blocks of neighbours and the documents inside them: reading stays local, and no list of millions is made.
WHOLE_SHUFFLE_DOCUMENTS = 1 << 16
BLOCK_DOCUMENTS = 1024


class DocumentOrder:
    """Position in the stream of drawn documents -> document.

    Args:
        num_documents: how many there are, at least one.
        seed: decides every epoch's permutation.
    """

    def __init__(self, num_documents: int, seed: int | str) -> None:
        self.num_documents, self.seed = num_documents, seed
        self._size = num_documents if num_documents <= WHOLE_SHUFFLE_DOCUMENTS else BLOCK_DOCUMENTS
        self._blocks: tuple[int, list[int]] = (-1, [])  # (epoch, order of the full blocks)
        self._block: tuple[tuple[int, int], list[int]] = ((-1, -1), [])  # ((epoch, block), documents in order)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_documents)
        number, inside = divmod(offset, self._size)
        if self._blocks[0] != epoch:
            blocks = list(range(self.num_documents // self._size))
            if len(blocks) > 1:
                random.Random(f"{self.seed}/{epoch}").shuffle(blocks)
            self._blocks = (epoch, blocks)
        # What does not fill a block comes last in every epoch.
        block = self._blocks[1][number] if number < len(self._blocks[1]) else number
        if self._block[0] != (epoch, block):
            first = block * self._size
            documents = list(range(first, min(first + self._size, self.num_documents)))
            key = f"{self.seed}/{epoch}" if self._size == self.num_documents else f"{self.seed}/{epoch}/{block}"
            random.Random(key).shuffle(documents)
            self._block = ((epoch, block), documents)
        return self._block[1][inside]
