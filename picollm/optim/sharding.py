"""Who owns what among W ranks: pure functions of names, shapes and the number of ranks.

Muon needs whole matrices, so a matrix has one owner. Matrices go into slots of equal size in the order in which
backward completes their gradients; W slots make a bucket, and slot r of each bucket belongs to rank r. One
reduce-scatter then brings each owner the sums of its matrices while the rest of backward still runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

from torch import Tensor

# Matrices below this share of the largest (gates) get room of their own in every slot, or each would open a slot.
SMALL_SHARE = 0.01


@runtime_checkable
class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when its result may be used: by the device's stream on a GPU, by the caller elsewhere."""


@runtime_checkable
class Ranks(Protocol):
    """What the optimizer asks of the other processes. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Handle:
        """Sum `whole` (W * n) over ranks and leave its r-th n elements in `part` of rank r."""

    def all_gather(self, whole: Tensor, part: Tensor) -> Handle:
        """Put the parts of all ranks side by side into `whole`."""

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Replace a tensor by its sum over ranks."""


@dataclass(frozen=True)
class Shard:
    """A piece of the training state that one rank alone has to save.

    Attributes:
        name: `parameter/state`.
        tensor: rows `rows[0]` up to `rows[1]` of the global tensor of `shape`.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    rows: tuple[int, int]


def backward_order(names: Iterable[str]) -> list[str]:
    """Names in about the order in which backward completes their gradients: head, last to first layer, embedding."""
    names = list(names)

    def key(index: int) -> tuple[float, int]:
        name = names[index]
        if name == "lm_head":
            return (-float("inf"), 0)
        layer = re.match(r"(?:layers|value_embeds)\.(\d+)\b", name)
        return (-float(layer[1]) if layer else 1.0, -index)

    return [names[i] for i in sorted(range(len(names)), key=key)]


def pack(shapes: dict[str, tuple[int, int]], world: int) -> list[list[list[str]]]:
    """Matrices -> buckets of `world` slots of matrix names, some perhaps empty.

    A bucket is a run of the given order, filled first-fit; in a slot equal shapes are neighbours, large ones first.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    largest = max(sizes.values(), default=0)
    capacity = largest + sum(size for size in sizes.values() if size <= SMALL_SHARE * largest)
    buckets: list[list[list[str]]] = []
    room: list[float] = []
    for name, size in sizes.items():
        slot = next((i for i, left in enumerate(room) if size <= left), None)
        if slot is None:
            buckets.append([[] for _ in range(world)])
            room, slot = [capacity if world > 1 else float("inf")] * world, 0
        buckets[-1][slot].append(name)
        room[slot] -= size
    for bucket in buckets:
        for slot in bucket:
            slot.sort(key=lambda name: (-sizes[name], shapes[name]))
    return buckets


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """A rank's rows of a tensor cut into equal parts; those of the last ranks may be short or empty."""
    share = -(-rows // world)
    return min(rows, rank * share), min(rows, (rank + 1) * share)
