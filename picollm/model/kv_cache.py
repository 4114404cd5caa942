"""Keys and values of earlier tokens, by row and explicit position."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from picollm.config.model import Architecture


class KVCache:
    """Room for `capacity` tokens in each of `batch` independent rows.

    A row's key at index j belongs to the token at position j. What stands above a row's newest position is never
    visible (attention compares indices with positions), so a slot is reused by writing from position 0 again and
    the padding of a batched prefill does no harm.

    Bytes: 2 * layers * batch * capacity * K * D * size of dtype; with smear 8 * batch * capacity more.

    Attributes:
        tokens: id at each position, for smear, which reads the token before; None where the model has none.
    """

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (arch.num_hidden_layers, batch, capacity, arch.num_key_value_heads, arch.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device) if arch.smear else None

    @property
    def batch(self) -> int:
        return self.keys.size(1)

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

    def view(self, start: int, stop: int) -> KVCache:
        """The cache as if it had only these rows; shares memory."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.tokens = None if self.tokens is None else self.tokens[start:stop]
        return view

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another row."""
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        if self.tokens is not None:
            self.tokens[target, :length] = self.tokens[source, :length]

    def update(
        self,
        layer: int,
        k: Float[Tensor, "B T K D"],
        v: Float[Tensor, "B T K D"],
        positions: Int[Tensor, "B T"],
        rows: Int[Tensor, " B"] | None,
        length: int,
    ) -> tuple[Float[Tensor, "B S K D"], Float[Tensor, "B S K D"]]:
        """Write the new tokens and return the first `length` keys and values of the rows.

        Args:
            rows: cache row of each batch row; None means all of them in order.
            length: S, one more than the highest position that any of these rows has reached.
        """
        keys, values = self.keys[layer], self.values[layer]
        index = self._index(rows)
        keys[index, positions] = k
        values[index, positions] = v
        if rows is None:
            return keys[:, :length], values[:, :length]
        return keys[rows, :length], values[rows, :length]

    def tokens_before(
        self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], rows: Int[Tensor, " B"] | None
    ) -> Int[Tensor, "B T"]:
        """Write the new tokens' ids and return the id before each; at position 0 it means nothing."""
        assert self.tokens is not None
        index = self._index(rows)
        self.tokens[index, positions] = ids
        return self.tokens[index, (positions - 1).clamp_min(0)]

    def _index(self, rows: Int[Tensor, " B"] | None) -> Int[Tensor, "B 1"]:
        return (torch.arange(self.batch, device=self.keys.device) if rows is None else rows)[:, None]


class Cached:
    """One forward pass's view of a KVCache: which rows, which positions, and the layer it has come to."""

    def __init__(self, cache: KVCache, positions: Int[Tensor, "B T"], rows: Int[Tensor, " B"] | None, length: int):
        self.cache, self.positions, self.rows, self.length = cache, positions, rows, length
        self.layer = 0

    def update(
        self, k: Float[Tensor, "B T K D"], v: Float[Tensor, "B T K D"]
    ) -> tuple[Float[Tensor, "B S K D"], Float[Tensor, "B S K D"]]:
        return self.cache.update(self.layer, k, v, self.positions, self.rows, self.length)
