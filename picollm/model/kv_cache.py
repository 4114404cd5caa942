"""Keys and values of earlier tokens, by row and explicit position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from picollm.config.model import Architecture


class KVCache:
    """Room for `capacity` tokens in each of `batch` independent rows.

    A row's key at index j belongs to the token at position j. What stands above a row's newest position is never
    visible (attention compares indices with positions), so a slot is reused by writing from position 0 again and
    the padding of a batched prefill does no harm.

    Bytes: 2 * layers * batch * capacity * K * D * size of dtype.
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

    @property
    def capacity(self) -> int:
        return self.keys.size(2)

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
        index = (torch.arange(keys.size(0), device=keys.device) if rows is None else rows)[:, None]  # (B, 1)
        keys[index, positions] = k
        values[index, positions] = v
        if rows is None:
            return keys[:, :length], values[:, :length]
        return keys[rows, :length], values[rows, :length]
