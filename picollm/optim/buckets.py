"""Parameters that are reduced, updated and gathered together: whole matrices, rows of one large tensor, or scalars.

Life of a bucket in a step: `launch` (reduction of the gradients), `receive` (until it is there), `update` (new state;
launches the gathering of what to subtract), `apply` (subtracts it, on every rank alike). With one rank nothing is
sent and nothing copied for sending: `update` subtracts at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from picollm.optim.adamw import adamw_update, group_name
from picollm.optim.muon import muon_update, neuron_axis
from picollm.optim.sharding import Handle, Ranks, Shard, row_range

Named = dict[str, nn.Parameter]
# Elements that are updated at once, unless one matrix has more. An update makes four to five copies of them, and a
# quarter of a gigabyte (float32) a copy keeps a GPU as busy as more would.
STACK_ELEMENTS = 1 << 26


class Kernels(NamedTuple):
    """The update functions, plain or compiled."""

    muon: Callable[..., Tensor] = muon_update
    adamw: Callable[..., Tensor] = adamw_update


class Hyper(NamedTuple):
    """What varies from step to step, on the device: rows of 8 for Muon and for each AdamW group."""

    muon: Tensor
    adamw: dict[str, Tensor]
    keep: Tensor | None
    grad_scale: Tensor | float

    def scaled(self, grad: Tensor) -> Tensor:
        return grad if isinstance(self.grad_scale, float) and self.grad_scale == 1.0 else grad * self.grad_scale


def _take(parameter: nn.Parameter) -> Tensor:
    """Its gradient, which it then has no longer; zeros where it took no part."""
    grad, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter.data) if grad is None else grad


def _fill(views: list[Tensor], parameters: list[nn.Parameter]) -> None:
    """Copy gradients to their places in a send buffer, and drop them."""
    present = [(view, p.grad) for view, p in zip(views, parameters, strict=True) if p.grad is not None]
    for view, p in zip(views, parameters, strict=True):
        if p.grad is None:
            view.zero_()
        p.grad = None
    if present:
        torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])


class Bucket(ABC):
    """What the kinds have in common: parameters, and messages under way."""

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks | None) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.whole: Tensor | None = None  # what all ranks send or receive
        self.part: Tensor | None = None  # this rank's share of it
        self.target: Tensor | None = None  # what the gathered updates are subtracted from
        self.handle: Handle | None = None

    @abstractmethod
    def launch(self) -> None:
        """Start to sum the gradients over ranks; they are dropped here."""

    @abstractmethod
    def own_gradients(self) -> Iterator[Tensor]:
        """This rank's share of the summed gradients, each element of the model once over all ranks."""

    @abstractmethod
    def update(self, kernels: Kernels, hyper: Hyper) -> None:
        """Update the state this rank holds and start to gather what is to be subtracted."""

    @abstractmethod
    def held(self) -> Iterator[Shard]:
        """The state that this rank holds."""

    def saved(self) -> Iterator[Shard]:
        """The part of it that no other rank saves."""
        return self.held()

    def receive(self) -> None:
        """Wait for the sums."""
        if self.handle is not None:
            self.handle.wait()
            self.handle = self.whole = None

    def gather(self, part: Tensor, whole: Tensor, target: Tensor) -> None:
        """Start to collect the ranks' updates; `apply` subtracts them from `target`, the first rows of `whole`."""
        assert self.ranks is not None
        self.part, self.whole, self.target = part, whole, target
        self.handle = self.ranks.all_gather(whole.view(-1), part.view(-1))

    def apply(self) -> None:
        """Subtract the gathered updates; every rank does the same sum, so weights stay alike in every bit."""
        if self.handle is not None:
            assert self.whole is not None and self.target is not None
            self.handle.wait()
            self.target.sub_(self.whole[: self.target.size(0)])
        self.handle = self.whole = self.part = self.target = None

    def drop(self) -> None:
        """Forget gradients, summed or not."""
        self.receive()
        self.part = None
        for p in self.parameters:
            p.grad = None


class Stack(NamedTuple):
    """Matrices of one shape that lie side by side in their owner's slot, with their state.

    Attributes:
        start: first element in the slot.
        weight: (N, R, C), a view of the parameters themselves; momentum alike.
        second_moment: per row (N, R, 1) or per column (N, 1, C).
    """

    names: list[str]
    parameters: list[nn.Parameter]
    start: int
    weight: Tensor
    momentum: Tensor
    second_moment: Tensor


def _runs(slot: list[str], matrices: Named) -> Iterator[list[str]]:
    """Neighbours of one shape, as many as STACK_ELEMENTS allow."""
    for shape, group in groupby(slot, key=lambda name: matrices[name].shape):
        names = list(group)
        parts = -(-len(names) // max(1, STACK_ELEMENTS // shape.numel()))
        size = -(-len(names) // parts)
        yield from (names[first : first + size] for first in range(0, len(names), size))


def _stacks(slot: list[str], matrices: Named, weights: Tensor) -> Iterator[Stack]:
    """The stacks of a slot whose weights are laid out in `weights`, with fresh state.

    A long run of one shape is cut into parts of about one size, so that few variants of the update are compiled.
    """
    start = 0
    for names in _runs(slot, matrices):
        rows, columns = shape = matrices[names[0]].shape
        weight = weights[start : start + len(names) * shape.numel()].view(len(names), rows, columns)
        per_neuron = (len(names), rows, 1) if neuron_axis(rows, columns) == -1 else (len(names), 1, columns)
        second_moment = weight.new_zeros(per_neuron)
        yield Stack(names, [matrices[n] for n in names], start, weight, torch.zeros_like(weight), second_moment)
        start += weight.numel()


class MatrixBucket(Bucket):
    """W slots of whole matrices; slot r belongs to rank r. The parameters become views of one buffer laid out so."""

    def __init__(
        self, slots: list[list[str]], matrices: Named, ranks: Ranks | None, wire: torch.dtype, dtype: torch.dtype
    ) -> None:
        super().__init__([matrices[name] for slot in slots for name in slot], ranks)
        self.wire, self.dtype = wire, dtype
        first = self.parameters[0]
        self.size = max(sum(matrices[name].numel() for name in slot) for slot in slots)
        self.weights = torch.zeros(len(slots), self.size, dtype=first.dtype, device=first.device)
        for p, view in zip(self.parameters, self._views(self.weights, slots, matrices), strict=True):
            view.copy_(p.data)
            p.data = view
        self.slots, self.matrices = slots, matrices
        mine = ranks.rank if ranks else 0
        self.stacks = list(_stacks(slots[mine], matrices, self.weights[mine]))

    @staticmethod
    def _views(buffer: Tensor, slots: list[list[str]], matrices: Named) -> Iterator[Tensor]:
        """Each parameter's place in a buffer of (W, size)."""
        for slot, row in zip(slots, buffer, strict=True):
            start = 0
            for name in slot:
                p = matrices[name]
                yield row[start : start + p.numel()].view_as(p)
                start += p.numel()

    def launch(self) -> None:
        if self.ranks is not None:
            self.whole = torch.empty_like(self.weights, dtype=self.wire)
            _fill(list(self._views(self.whole, self.slots, self.matrices)), self.parameters)
            self.part = self.whole.new_empty(self.size)
            self.handle = self.ranks.reduce_scatter(self.part, self.whole.view(-1))

    def own_gradients(self) -> Iterator[Tensor]:
        if self.part is None:
            yield from (p.grad for p in self.parameters if p.grad is not None)
        else:
            yield from (self.part[s.start : s.start + s.weight.numel()] for s in self.stacks)

    def _gradient(self, stack: Stack) -> Tensor:
        if self.part is None:
            return torch.stack([_take(p) for p in stack.parameters])
        return self.part[stack.start : stack.start + stack.weight.numel()].view_as(stack.weight).to(stack.weight.dtype)

    def update(self, kernels: Kernels, hyper: Hyper) -> None:
        out = None if self.ranks is None else self.weights.new_zeros(self.size, dtype=self.wire)
        for stack in self.stacks:
            grad = hyper.scaled(self._gradient(stack))
            update = kernels.muon(
                grad, stack.weight, stack.momentum, stack.second_moment, hyper.muon, hyper.keep, self.dtype
            )
            if out is None:
                stack.weight.sub_(update)
            else:
                out[stack.start : stack.start + update.numel()].view_as(update).copy_(update)
        if out is not None:
            self.gather(out, torch.empty_like(self.weights, dtype=self.wire), self.weights)

    def held(self) -> Iterator[Shard]:
        for stack in self.stacks:
            for name, *state in zip(stack.names, stack.momentum, stack.second_moment, strict=True):
                for key, tensor in zip(("momentum", "second_moment"), state, strict=True):
                    yield Shard(f"{name}/{key}", tensor, tuple(tensor.shape), (0, tensor.size(0)))


class RowBucket(Bucket):
    """One large tensor under AdamW; each rank owns an equal run of its rows."""

    def __init__(self, name: str, parameter: nn.Parameter, ranks: Ranks | None, wire: torch.dtype) -> None:
        super().__init__([parameter], ranks)
        self.name, self.group, self.parameter, self.wire = name, str(group_name(name)), parameter, wire
        rank, self.world = (ranks.rank, ranks.world) if ranks else (0, 1)
        self.rows = row_range(parameter.size(0), rank, self.world)
        self.m = torch.zeros_like(parameter.data[slice(*self.rows)])
        self.v = torch.zeros_like(self.m)

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Zeros for all ranks and for one: rows padded to a multiple of W."""
        share = -(-self.parameter.size(0) // self.world)
        p = self.parameter.data
        return (p.new_zeros((share * self.world, *p.shape[1:]), dtype=self.wire),
                p.new_zeros((share, *p.shape[1:]), dtype=self.wire))  # fmt: skip

    def launch(self) -> None:
        if self.ranks is not None:
            self.whole, self.part = self._buffers()
            _fill([self.whole[: self.parameter.size(0)]], [self.parameter])
            self.handle = self.ranks.reduce_scatter(self.part.view(-1), self.whole.view(-1))

    def own_gradients(self) -> Iterator[Tensor]:
        if self.part is not None:
            yield self.part[: self.m.size(0)]
        elif self.parameter.grad is not None:
            yield self.parameter.grad

    def update(self, kernels: Kernels, hyper: Hyper) -> None:
        grad = _take(self.parameter) if self.part is None else self.part[: self.m.size(0)].to(self.m.dtype)
        weight = self.parameter.data[slice(*self.rows)]
        update = kernels.adamw(hyper.scaled(grad), weight, self.m, self.v, hyper.adamw[self.group], hyper.keep)
        if self.ranks is None:
            weight.sub_(update)
        else:
            whole, part = self._buffers()
            part[: self.m.size(0)] = update
            self.gather(part, whole, self.parameter.data)

    def held(self) -> Iterator[Shard]:
        if self.m.size(0):
            for key, tensor in (("m", self.m), ("v", self.v)):
                yield Shard(f"{self.name}/{key}", tensor, tuple(self.parameter.shape), self.rows)


class ScalarBucket(Bucket):
    """Scalars and short vectors: summed over ranks in one message, updated by every rank alike."""

    def __init__(self, named: Named, ranks: Ranks | None) -> None:
        super().__init__(list(named.values()), ranks)
        self.names = list(named)
        self.m = [torch.zeros_like(p.data) for p in self.parameters]
        self.v = [torch.zeros_like(p.data) for p in self.parameters]

    def launch(self) -> None:
        if self.ranks is not None:
            self.part = torch.cat([_take(p) for p in self.parameters])
            self.handle = self.ranks.all_reduce(self.part)

    def own_gradients(self) -> Iterator[Tensor]:
        if self.part is None:
            yield from (p.grad for p in self.parameters if p.grad is not None)
        elif self.ranks is not None and self.ranks.rank == 0:
            yield self.part

    def update(self, kernels: Kernels, hyper: Hyper) -> None:
        if self.part is None:
            grads = [_take(p) for p in self.parameters]
        else:
            grads = list(self.part.split([p.numel() for p in self.parameters]))
        for name, p, grad, m, v in zip(self.names, self.parameters, grads, self.m, self.v, strict=True):
            row = hyper.adamw[str(group_name(name))]
            p.data.sub_(kernels.adamw(hyper.scaled(grad), p.data, m, v, row, hyper.keep))

    def held(self) -> Iterator[Shard]:
        for name, m, v in zip(self.names, self.m, self.v, strict=True):
            for key, tensor in (("m", m), ("v", v)):
                yield Shard(f"{name}/{key}", tensor, tuple(tensor.shape), (0, tensor.size(0)))

    def saved(self) -> Iterator[Shard]:
        return self.held() if self.ranks is None or self.ranks.rank == 0 else iter(())
