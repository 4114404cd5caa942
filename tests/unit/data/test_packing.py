"""Rows of any document lengths: nothing lost, resumable at every row, equal for any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from picollm.data.packing import IGNORED, Batches, Encoded, RowPacker
from picollm.errors import ConfigError

BOS = 0
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def encoder(sizes: list[int], masked: bool = False):
    """Document i is the tokens i*100 + 1, i*100 + 2, …; with `masked`, its second half carries loss."""

    def encode(indices: Sequence[int]) -> list[Encoded]:
        out = []
        for i in indices:
            ids = np.arange(i * 100 + 1, i * 100 + 1 + sizes[i], dtype=np.int32)
            out.append(Encoded(ids, np.arange(sizes[i]) >= sizes[i] // 2 if masked else None))
        return out

    return encode


def packer(sizes: list[int], *, cut: bool = True, buffer: int = 4, seed: int = 1, T: int = 12) -> RowPacker:
    return RowPacker(
        encoder(sizes, masked=not cut), len(sizes), length=T, bos=BOS, seed=seed, buffer_size=buffer, cut=cut
    )


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9))
def test_text_is_used_whole_and_rows_are_full(sizes: list[int], buffer: int) -> None:
    p = packer(sizes, buffer=buffer)
    seen: list[int] = []
    while p.row < 40:
        ids, mask = p.next_row()
        assert ids[0] == BOS and ids.shape == (13,)
        seen += [int(t) for t in ids if t != BOS]
        assert all(mask[1:][ids[1:] != BOS])
        assert p.tokens == len(seen)
        # A row ends early only by the one position that a lone bos would leave.
        assert (ids[1:] == BOS).sum() <= 12 - (ids[1:] != BOS).sum()
    left = [(size, doc, start) for size, doc, start in p._pieces]
    for size, doc, start in left:
        seen += [doc * 100 + 1 + start + i for i in range(size)]
    # Everything drawn is in a row or in the buffer, as often as it was drawn.
    drawn = [p._document_at(i) for i in range(p.drawn)]
    expected = [doc * 100 + 1 + i for doc in drawn for i in range(sizes[doc])]
    assert sorted(seen) == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(lengths, st.booleans(), st.integers(0, 25))
def test_a_restored_packer_goes_on_exactly(sizes: list[int], cut: bool, after: int) -> None:
    assume(cut or any(size // 2 < min(size, 12) for size in sizes))
    whole = packer(sizes, cut=cut)
    rows = [whole.next_row() for _ in range(after + 10)]
    first = packer(sizes, cut=cut)
    for _ in range(after):
        first.next_row()
    second = packer(sizes, cut=cut)
    second.restore(json.loads(json.dumps(first.state())))
    for ids, mask in rows[after:]:
        again, again_mask = second.next_row()
        assert np.array_equal(ids, again) and np.array_equal(mask, again_mask)
    assert second.state() == whole.state()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_rows(world: int) -> None:
    sizes = [5, 30, 7, 12, 1, 22, 9]
    alone, count = Batches(packer(sizes), rows_per_step=8, device_batch_size=8, rank=0, world=1).next_step()
    parts = []
    for rank in range(world):
        batches = Batches(packer(sizes), rows_per_step=8, device_batch_size=3, rank=rank, world=world)
        micro, counted = batches.next_step()
        assert counted == count
        assert all(len(ids) <= 3 for ids, _ in micro)
        parts.append(np.concatenate([ids for ids, _ in micro]))
    merged = np.empty_like(alone[0][0])
    for rank, part in enumerate(parts):
        merged[rank::world] = part
    assert np.array_equal(merged, alone[0][0])


def test_conversations_are_never_cut_and_padding_carries_no_loss() -> None:
    sizes = [5, 6, 11, 4, 12, 3]
    p = packer(sizes, cut=False)
    for _ in range(30):
        ids, mask = p.next_row()
        documents = [int(t) // 100 for t in ids if t != BOS]
        for doc in set(documents):
            assert documents.count(doc) % sizes[doc] == 0, "a conversation was cut"
        assert not mask[ids == BOS].any()
    micro, count = Batches(p, rows_per_step=2, device_batch_size=2, rank=0, world=1).next_step()
    assert count == (micro[0][1] != IGNORED).sum() > 0


def test_a_conversation_longer_than_a_row_keeps_its_head_if_that_is_trained() -> None:
    p = packer([15, 40], cut=False, T=12)  # of 40 tokens the trained half starts behind the row's end
    documents = {int(t) // 100 for _ in range(10) for t in p.next_row()[0] if t != BOS}
    assert documents == {0}


def test_the_order_is_a_permutation_per_epoch_and_depends_on_the_seed() -> None:
    p, other = packer([1] * 20), packer([1] * 20, seed=2)
    epochs = [[p._document_at(e * 20 + i) for i in range(20)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other._document_at(i) for i in range(20)]


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_nothing_to_train_on_is_an_error_not_a_hang(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        packer(sizes).next_row()
