"""One optimizer for 1..N ranks: Muon for the matrices inside blocks, AdamW for the rest, state at one owner each.

With W ranks the weights are replicated, gradients are summed to their owner during the last backward of a step, and
what the owner wants to subtract is gathered by all (ZeRO stage 2, Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from picollm.config.recipe import Rates, Schedule
from picollm.optim import schedules
from picollm.optim.adamw import ADAM_GROUPS, adamw_update, group_name
from picollm.optim.buckets import Bucket, Hyper, Kernels, MatrixBucket, RowBucket, ScalarBucket
from picollm.optim.muon import muon_update
from picollm.optim.sharding import Ranks, Shard, backward_order, pack

RATES = tuple(name.removesuffix("_lr") for name in Rates.model_fields if name.endswith("_lr"))


class MuonAdamW:
    """Updates a GPT in place.

    The matrices' `.data` is replaced by views of larger buffers, so that a step is a few batched products instead of
    hundreds of small ones. Sums over ranks, not means: the loss carries the scale.

    Args:
        dtype: type of the orthogonalisation; bfloat16 is enough (the iteration is self-correcting).
        wire_dtype: type in which gradients and updates of matrices and embeddings travel; bfloat16 where the
            iteration is, else the weights' own. The head and the scalars always travel in the weights' type: the
            head's gradient is a difference of large sums, and it is the one tensor every logit depends on.
        ranks: the other processes; None for one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        rates: Rates,
        schedule: Schedule,
        steps: int,
        *,
        dtype: torch.dtype,
        wire_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.rates, self.schedule, self.steps, self.dtype = rates, schedule, steps, dtype
        self.ranks = ranks if ranks is not None and ranks.world > 1 else None
        self.kernels = Kernels()
        named = dict(model.named_parameters())
        self.weight_dtype = next(iter(named.values())).dtype
        self.device = next(iter(named.values())).device
        wire = wire_dtype or (torch.bfloat16 if dtype == torch.bfloat16 else self.weight_dtype)
        self.buckets = self._make_buckets(named, wire)
        self.launched = 0
        self.waiting: list[set[nn.Parameter]] | None = None  # per bucket, during the last backward only
        if self.ranks is not None:
            for number, bucket in enumerate(self.buckets):
                for p in bucket.parameters:
                    p.register_post_accumulate_grad_hook(lambda p, number=number: self._arrived(p, number))

    def _make_buckets(self, named: dict[str, nn.Parameter], wire: torch.dtype) -> list[Bucket]:
        """Buckets in the order in which backward completes them."""
        order = backward_order(named)
        matrices = {name: named[name] for name in order if group_name(name) is None}
        assert all(p.dim() == 2 for p in matrices.values()), "what is neither a matrix nor in ADAM_GROUPS has no rule"
        scalars = {name: named[name] for name in order if group_name(name) and named[name].dim() == 1}
        completed: list[tuple[int, Bucket]] = []
        world = self.ranks.world if self.ranks else 1
        for slots in pack({name: tuple(p.shape) for name, p in matrices.items()}, world):
            last = max(order.index(name) for slot in slots for name in slot)
            completed.append((last, MatrixBucket(slots, matrices, self.ranks, wire, self.dtype)))
        for name in order:
            if group_name(name) and name not in scalars:
                own = self.weight_dtype if name == "lm_head" else wire
                completed.append((order.index(name), RowBucket(name, named[name], self.ranks, own)))
        buckets = [bucket for _, bucket in sorted(completed, key=lambda item: item[0])]
        return [*buckets, ScalarBucket(scalars, self.ranks)] if scalars else buckets

    def compile(self) -> None:
        """Compile the update functions; one compilation per shape of a stack or tensor, none per step."""
        # One function serves every shape, so torch's default limit of 8 variants is too low for deep models.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        compiled = (torch.compile(f, fullgraph=True, dynamic=False) for f in (muon_update, adamw_update))
        self.kernels = Kernels(*compiled)

    def rates_at(self, step: int) -> dict[str, float]:
        """Learning rate by group at a step, for the log."""
        factor = schedules.lr_factor(step, self.steps, self.schedule)
        return {name: getattr(self.rates, f"{name}_lr") * factor for name in RATES}

    def last_micro_batch(self) -> None:
        """Before the last backward of a step: from now on a bucket's reduction starts when its gradients are there."""
        if self.ranks is not None:
            self.waiting = [set(bucket.parameters) for bucket in self.buckets]

    def _arrived(self, parameter: nn.Parameter, number: int) -> None:
        if self.waiting is None:
            return
        self.waiting[number].discard(parameter)
        # In order, whatever the order of arrival: collectives have to match between ranks.
        while self.launched < len(self.buckets) and not self.waiting[self.launched]:
            self.buckets[self.launched].launch()
            self.launched += 1

    def _reduce(self) -> None:
        """Launch what backward did not complete (parameters that took no part), and wait for everything."""
        self.waiting = None
        for bucket in self.buckets[self.launched :]:
            bucket.launch()
        self.launched = len(self.buckets)
        for bucket in self.buckets:
            bucket.receive()

    @torch.no_grad()
    def grad_square(self) -> Tensor:
        """Sum of squares of this rank's share of the summed gradients, 0-D; its sum over ranks is the whole norm's.

        Waits for all reductions. Scalars, which every rank holds, are counted by rank 0.
        """
        self._reduce()
        grads = [grad for bucket in self.buckets for grad in bucket.own_gradients()]
        if not grads:
            return torch.zeros((), dtype=self.weight_dtype, device=self.device)
        return torch.stack(torch._foreach_norm(grads, dtype=self.weight_dtype)).square().sum()

    def _hyper(self, step: int, keep: Tensor | None, grad_scale: Tensor | float) -> Hyper:
        """The step's numbers on the device, in one transfer that nobody waits for."""
        lr = self.rates_at(step)
        decay = self.rates.weight_decay * schedules.decay_factor(step, self.steps)
        rows = [[schedules.momentum(step, self.steps, self.schedule), lr["matrix"], decay]]
        rows += [group.hyper(lr[group.rate], step + 1) for group in ADAM_GROUPS.values()]
        # Rows of 8 keep each one aligned for compiled kernels.
        table = torch.tensor([row + [0.0] * (8 - len(row)) for row in rows], dtype=self.weight_dtype)
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        return Hyper(table[0], dict(zip(ADAM_GROUPS, table[1:], strict=True)), keep, grad_scale)

    @torch.no_grad()
    def step(self, step: int, *, keep: Tensor, grad_scale: Tensor | float = 1.0) -> None:
        """Apply the gradients of step number `step` (from 0) and drop them.

        Args:
            keep: 0-D, the same on every rank; 0 leaves weights and state as they are, whatever the gradients hold.
            grad_scale: 0-D or a number; gradients are multiplied by it (one over the loss scale).
        """
        self._reduce()
        on_host = keep.device.type == "cpu"  # asking costs nothing there, and selecting in every kernel a third of it
        if on_host and not keep:
            return self.zero_grad()
        hyper = self._hyper(step, None if on_host else keep != 0, grad_scale)
        before: Bucket | None = None
        for bucket in self.buckets:
            bucket.update(self.kernels, hyper)
            if before is not None:  # its gathering ran beside this bucket's update
                before.apply()
            before = bucket
        if before is not None:
            before.apply()
        self.launched = 0

    def zero_grad(self) -> None:
        """Drop the gradients, summed ones too."""
        if self.waiting is not None or self.launched:
            self._reduce()  # what some rank has sent, all ranks must
        for bucket in self.buckets:
            bucket.drop()
        self.waiting, self.launched = None, 0

    def shards(self) -> Iterator[Shard]:
        """The state that this rank has to save; over all ranks each piece comes once."""
        for bucket in self.buckets:
            yield from bucket.saved()

    @torch.no_grad()
    def load(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Take over a saved state, of any number of ranks.

        Args:
            read: (name, start, end) -> rows start:end of the tensor `name`; asked only for what this rank holds.
        """
        for bucket in self.buckets:
            for shard in bucket.held():
                shard.tensor.copy_(read(shard.name, *shard.rows))
