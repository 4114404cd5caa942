"""Batches made ahead are the batches, in order, each with the position behind it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.prefetch import STEPS_AHEAD, Prefetcher, StepBatches
from picollm.data.token_source import Encode, Encoded, LiveTokens

CPU = torch.device("cpu")


def encode(indices: Sequence[int]) -> list[Encoded]:
    return [Encoded(np.arange(i % 7, i % 7 + 5 + i % 11, dtype=np.int32)) for i in indices]


def make_batches(encode: Encode = encode) -> Batches:
    packer = RowPacker(Mixture([LiveTokens(encode, 40)], [1.0], 1), length=6, bos=0, seed=1, buffer_size=5)
    return Batches(packer, rows_per_step=5, device_batch_size=2, rank=0, world=1)


def take(batches: Batches, steps: int) -> list[StepBatches]:
    prefetcher = Prefetcher(batches, steps, CPU)
    made = [prefetcher.next() for _ in range(steps)]
    prefetcher.close()
    return made


def same(first: StepBatches, second: StepBatches) -> bool:
    pairs = zip(first.micro_batches, second.micro_batches, strict=True)
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_they_are_the_batches_in_order_with_the_position_behind_each() -> None:
    direct = make_batches()
    for made in take(make_batches(), 30):
        arrays, count = direct.next_step()
        assert [tuple(pair[0].shape) for pair in made.micro_batches] == [(2, 6), (2, 6), (1, 6)]
        for (inputs, targets), (ids, wanted) in zip(made.micro_batches, arrays, strict=True):
            assert inputs.numpy().tolist() == ids.tolist() and targets.numpy().tolist() == wanted.tolist()
        assert (made.count, made.position, made.epoch) == (count, direct.packer.state(), direct.packer.epoch)


def test_a_position_restores_the_batches_behind_it() -> None:
    whole = take(make_batches(), 12)
    batches = make_batches()
    batches.packer.restore(whole[6].position)
    assert all(same(a, b) for a, b in zip(take(batches, 5), whole[7:], strict=True))


def test_it_makes_no_more_than_it_is_asked_for() -> None:
    batches = make_batches()
    take(batches, 3)
    assert batches.packer.row == 15
    assert take(make_batches(), 0) == []


def test_it_runs_ahead_by_a_bounded_number_of_steps_and_ends_when_nobody_asks() -> None:
    drawn = threading.Semaphore(0)

    def counted(indices: Sequence[int]) -> list[Encoded]:
        drawn.release()
        return [Encoded(np.arange(30, dtype=np.int32))] * len(indices)

    batches = make_batches(counted)
    prefetcher = Prefetcher(batches, 1000, CPU)
    prefetcher.next()
    assert drawn.acquire(timeout=10)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()
    assert batches.packer.row <= 5 * (STEPS_AHEAD + 2)


def test_what_making_them_raises_is_raised_where_they_are_asked_for() -> None:
    calls = 0

    def failing(indices: Sequence[int]) -> list[Encoded]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("the disk is gone")
        return encode(indices)

    prefetcher = Prefetcher(make_batches(failing), 1000, CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(1000):
            prefetcher.next()
    prefetcher.close()


def test_waiting_is_measured() -> None:
    gate = threading.Event()

    def slow(indices: Sequence[int]) -> list[Encoded]:
        assert gate.wait(10)
        return encode(indices)

    prefetcher = Prefetcher(make_batches(slow), 2, CPU)
    threading.Timer(0.05, gate.set).start()
    prefetcher.next()
    assert prefetcher.wait_s > 0
    prefetcher.close()
