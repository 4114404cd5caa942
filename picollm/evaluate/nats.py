"""Nats of rows of tokens, computed by all ranks together: passes are the same on any number of them.

A pass is scored by one rank, r, r + W, … by rank r of W. Every row's figure comes from one rank and is added to the
others' zeros, so that what is made of the rows is the same number, to the last bit, wherever passes are.

Letters: B rows of a pass, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from picollm.data.packing import IGNORED
from picollm.model.gpt import GPT

# Tokens in one pass. On a CPU what a pass needs beside the weights grows with them, its speed hardly does. On a GPU
# a pass has to keep it busy while the host launches the next one's kernels, which are not compiled; it needs some
# 32·C bytes a token, at C 2 048 a GiB, where the gradients that training holds are several. Not more than that: of
# the default `train.eval_tokens` there is a pass for each of eight GPUs. By arithmetic, not measured.
PASS_TOKENS = {"cpu": 2**12, "cuda": 2**14}

# Inputs and targets of one row, (T,) each; IGNORED targets are not scored.
Row = tuple[np.ndarray, np.ndarray]


class Handle(Protocol):
    def wait(self) -> object: ...


class Ranks(Protocol):
    """What an evaluation asks of the other processes; `train.distributed.Ranks`."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> Handle:
        """Replace a tensor by its sum over ranks."""


def rows_per_pass(model: GPT, T: int) -> int:
    """Rows of up to T tokens in a pass on the model's device; what training takes at a time depends on the ranks."""
    return max(1, PASS_TOKENS.get(model.embed_tokens.device.type, PASS_TOKENS["cpu"]) // T)


def nats_of_rows(
    model: GPT,
    rows: Sequence[Row],
    per_pass: int,
    ranks: Ranks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """-log p of each row's targets in nats, float64 (N,), the same on every rank; each gives all N rows, in one order.

    Args:
        per_pass: rows of one forward pass; rows of a pass are padded to its longest.
        ranks: those that take part; None for this process alone.
        on_progress: called with the rows done after each round of one pass a rank, equally often on all ranks. What it
            raises ends the job, so all have to raise at the same call.
    """
    rank, world = (ranks.rank, ranks.world) if ranks is not None else (0, 1)
    device = model.embed_tokens.device
    nats = np.zeros(len(rows))
    for first in range(0, len(rows), per_pass * world):
        at = first + per_pass * rank
        if mine := rows[at : at + per_pass]:  # the last round may have no pass for every rank
            ids, targets = (torch.from_numpy(array).to(device) for array in _pad(mine))
            nats[at : at + len(mine)] = model.nats(ids, targets).sum(dim=1, dtype=torch.float64).cpu().numpy()
        if on_progress is not None:
            on_progress(min(len(rows), first + per_pass * world))
    if ranks is not None and len(rows):
        total = torch.from_numpy(nats).to(device)
        ranks.all_reduce(total).wait()
        nats = total.cpu().numpy()
    return nats


def _pad(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T) of int64; right padding is an ignored target."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for index, (inputs, wanted) in enumerate(rows):
        ids[index, : len(inputs)] = inputs
        targets[index, : len(wanted)] = wanted
    return ids, targets
