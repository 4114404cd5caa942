"""Rows of any document lengths: nothing lost, resumable at every row, equal for any number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from picollm.data.mixture import Mixture
from picollm.data.order import BLOCK_DOCUMENTS, WHOLE_SHUFFLE_DOCUMENTS, DocumentOrder
from picollm.data.packing import IGNORED, Batches, Packing, RowPacker
from picollm.data.token_source import CachedTokens, Encoded, LiveTokens
from picollm.errors import ConfigError

BOS = 0
T = 12
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
packings = st.sampled_from(["best_fit", "concat", "documents", "whole"])


def tokens_of(document: int, size: int) -> np.ndarray:
    """Document i is the tokens i*100 + 1, i*100 + 2, …"""
    return np.arange(document * 100 + 1, document * 100 + 1 + size, dtype=np.int32)


def live(sizes: list[int], *, whole: bool = False) -> LiveTokens:
    """With `whole`, documents are conversations whose second half carries loss."""

    def encode(indices: Sequence[int]) -> list[Encoded]:
        masks = [np.arange(sizes[i]) >= sizes[i] // 2 if whole else None for i in indices]
        return [Encoded(tokens_of(i, sizes[i]), mask) for i, mask in zip(indices, masks, strict=True)]

    return LiveTokens(encode, len(sizes), limit=T if whole else None)


def cached(sizes: list[int], parts: int = 3) -> CachedTokens:
    bounds = np.linspace(0, len(sizes), parts + 1).astype(int)
    made = []
    for first, end in pairwise(bounds):
        ids = [tokens_of(i, sizes[i]) for i in range(first, end)]
        offsets = np.cumsum([0, *(len(x) for x in ids)]).astype(np.uint64)
        made.append((np.concatenate([np.empty(0, np.int32), *ids]).astype(np.uint16), offsets))
    return CachedTokens(made)


def packer(sizes: list[int], packing: Packing = "best_fit", *, buffer: int = 4, seed: int = 1) -> RowPacker:
    mixture = Mixture([live(sizes, whole=packing == "whole")], [1.0], seed)
    return RowPacker(mixture, length=T, bos=BOS, seed=seed, buffer_size=buffer, packing=packing)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.sampled_from(["best_fit", "concat"]))
def test_text_is_used_whole_and_rows_are_full(sizes: list[int], buffer: int, packing: Packing) -> None:
    p = packer(sizes, packing, buffer=buffer)
    seen: list[int] = []
    while p.row < 40:
        ids, mask = p.next_row()
        assert ids[0] == BOS and ids.shape == (T + 1,)
        seen += [int(t) for t in ids if t != BOS]
        assert all(mask[1:][ids[1:] != BOS])
        assert p.tokens == len(seen) >= p.cut_tokens
        # A row ends early only by the one position that a lone bos would leave.
        assert (ids[1:] == BOS).sum() <= T - (ids[1:] != BOS).sum()
    for size, document, start in p._pieces:
        seen += [document * 100 + 1 + start + i for i in range(size)]
    # Everything drawn is in a row or in the buffer, as often as it was drawn.
    order = DocumentOrder(len(sizes), 1)
    drawn = [order[i] for i in range(p.documents.state()[0][0])]
    assert sorted(seen) == sorted(document * 100 + 1 + i for document in drawn for i in range(sizes[document]))


def test_concat_keeps_the_order_of_documents() -> None:
    sizes = [5, 30, 7, 12, 1, 22, 9]
    p = packer(sizes, "concat")
    order = DocumentOrder(len(sizes), 1)
    stream = [int(t) for i in range(7) for t in tokens_of(order[i], sizes[order[i]])]
    seen: list[int] = []
    while len(seen) < len(stream):
        seen += [int(t) for t in p.next_row()[0] if t != BOS]
    assert seen[: len(stream)] == stream


@settings(max_examples=60, deadline=None)
@given(lengths, packings, st.integers(0, 25))
def test_a_restored_packer_goes_on_exactly(sizes: list[int], packing: Packing, after: int) -> None:
    assume(packing != "whole" or any(size // 2 < min(size, T) for size in sizes))
    whole = packer(sizes, packing)
    rows = [whole.next_row() for _ in range(after + 10)]
    first = packer(sizes, packing)
    for _ in range(after):
        first.next_row()
    second = packer(sizes, packing)
    second.restore(json.loads(json.dumps(first.state())))
    for ids, mask in rows[after:]:
        again, again_mask = second.next_row()
        assert np.array_equal(ids, again) and np.array_equal(mask, again_mask)
    assert second.state() == whole.state()


@settings(max_examples=40, deadline=None)
@given(lengths, st.sampled_from(["best_fit", "concat"]), st.integers(1, 5))
def test_the_cache_gives_the_same_rows(sizes: list[int], packing: Packing, parts: int) -> None:
    a, b = (
        RowPacker(Mixture([source], [1.0], 5), length=T, bos=BOS, seed=5, buffer_size=4, packing=packing)
        for source in (live(sizes), cached(sizes, parts))
    )
    for _ in range(30):
        for x, y in zip(a.next_row(), b.next_row(), strict=True):
            assert np.array_equal(x, y)
    assert a.state() == b.state()


@settings(max_examples=40, deadline=None)
@given(lengths, packings, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 4))
def test_ranks_share_the_same_rows_and_may_change_in_number(
    sizes: list[int], packing: Packing, before: int, after: int, steps: int
) -> None:
    """Steps on `before` ranks, then on `after` ones, against one rank throughout."""
    assume(packing != "whole" or any(size // 2 < min(size, T) for size in sizes))

    def batches(rank: int, world: int) -> Batches:
        return Batches(packer(sizes, packing), rows_per_step=8, device_batch_size=3, rank=rank, world=world)

    alone = batches(0, 1)
    expected = [alone.next_step() for _ in range(steps + 1)]
    state = None
    for world, first, count in ((before, 0, steps), (after, steps, 1)):
        ranks = [batches(rank, world) for rank in range(world)]
        for rank in ranks:
            if state is not None:
                rank.packer.restore(json.loads(json.dumps(state)))
        for step in range(first, first + count):
            merged = [np.empty((8, T), dtype=np.int64) for _ in range(2)]
            for number, rank in enumerate(ranks):
                micro, counted = rank.next_step()
                assert counted == expected[step][1] == sum((m[1] != IGNORED).sum() for m in expected[step][0])
                assert all(len(batch[0]) <= 3 for batch in micro)
                for i in range(2):
                    merged[i][number::world] = np.concatenate([batch[i] for batch in micro])
            for i in range(2):
                assert np.array_equal(merged[i], np.concatenate([pair[i] for pair in expected[step][0]]))
        state = ranks[0].packer.state()


@pytest.mark.parametrize(
    ("packing", "digest"),
    [
        ("best_fit", "1cd8f355c62efa92e05df2a48106933579208ab16b0a8945e60bb9c53348e734"),
        ("whole", "848c8e70241d4feddb84e4d53e3bf0a9a351e5a225a0672e412194539429bf0e"),
    ],
)
def test_rows_are_those_of_the_first_packer(packing: Packing, digest: str) -> None:
    """Golden: 500 rows as commit d354793 made them, before there were mixtures, plans and caches."""
    sizes = [(i * 37) % 53 for i in range(300)]
    p = packer(sizes, packing, buffer=40, seed=7)
    found = hashlib.sha256(b"".join(ids.tobytes() + mask.tobytes() for ids, mask in (p.next_row() for _ in range(500))))
    assert found.hexdigest() == digest


def test_a_position_that_an_older_version_wrote_is_refused() -> None:
    older = {"drawn": 64, "row": 3, "tokens": 30, "pieces": [[5, 1, 0]]}
    with pytest.raises(ConfigError, match="cannot be gone on from"):
        packer([5, 6]).restore(older)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 4))
def test_bounds_are_where_pieces_start(sizes: list[int], rows: int) -> None:
    """With documents apart a batch says where each begins: at every bos of it, which text never holds."""
    batches = Batches(packer(sizes, "documents"), rows_per_step=8, device_batch_size=rows, rank=0, world=1)
    plain = Batches(packer(sizes), rows_per_step=8, device_batch_size=rows, rank=0, world=1)
    for (ids, targets, bounds), pair in zip(batches.next_step()[0], plain.next_step()[0], strict=True):
        assert np.array_equal(ids, pair[0]) and np.array_equal(targets, pair[1])
        starts = np.flatnonzero(ids.ravel() == BOS)
        assert bounds.dtype == np.int32 and bounds.tolist() == [*starts, ids.size]


def test_conversations_are_never_cut_and_padding_carries_no_loss() -> None:
    sizes = [5, 6, 11, 4, 12, 3]
    p = packer(sizes, "whole")
    for _ in range(30):
        ids, mask = p.next_row()
        documents = [int(t) // 100 for t in ids if t != BOS]
        for document in set(documents):
            assert documents.count(document) % sizes[document] == 0, "a conversation was cut"
        assert not mask[ids == BOS].any()
    micro, count = Batches(p, rows_per_step=2, device_batch_size=2, rank=0, world=1).next_step()
    assert count == (micro[0][1] != IGNORED).sum() > 0


def test_a_conversation_longer_than_a_row_keeps_its_head_if_that_is_trained() -> None:
    p = packer([15, 40], "whole")  # of 40 tokens the trained half starts behind the row's end
    assert {int(t) // 100 for _ in range(10) for t in p.next_row()[0] if t != BOS} == {0}


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_nothing_to_train_on_is_an_error_not_a_hang(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="nothing to train on"):
        packer(sizes).next_row()


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [20, WHOLE_SHUFFLE_DOCUMENTS + 3 * BLOCK_DOCUMENTS + 17])
def test_the_order_is_a_permutation_per_epoch_and_depends_on_the_seed(num: int) -> None:
    order, other = DocumentOrder(num, 1), DocumentOrder(num, 2)
    epochs = [[order[epoch * num + i] for i in range(num)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(num))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [other[i] for i in range(num)]
    assert [DocumentOrder(num, 1)[i] for i in (num - 1, 0, num + 5)] == [epochs[0][-1], epochs[0][0], epochs[1][5]]


def test_a_large_dataset_is_read_in_neighbourhoods() -> None:
    order = DocumentOrder(WHOLE_SHUFFLE_DOCUMENTS + 100, 1)
    first = [order[i] for i in range(BLOCK_DOCUMENTS)]
    assert max(first) - min(first) == BLOCK_DOCUMENTS - 1 and first != sorted(first)


# -- mixtures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(lengths, st.floats(0.1, 10)), min_size=2, max_size=4), st.integers(0, 300))
def test_shares_are_exact_to_one_document_and_resumable(parts: list[tuple[list[int], float]], after: int) -> None:
    def mixture() -> Mixture:
        return Mixture([live(sizes) for sizes, _ in parts], [weight for _, weight in parts], 3)

    whole = mixture()
    drawn = [whole.draw() for _ in range(after + 200)]
    second = mixture()
    half = mixture()
    for _ in range(after):
        half.draw()
    second.restore(json.loads(json.dumps(half.state())), [])
    assert [second.draw() for _ in range(200)] == drawn[after:]
    total = sum(weight for _, weight in parts)
    tokens = sum(size for _, size in drawn)
    for (sizes, weight), share in zip(parts, whole.shares, strict=True):
        # Nobody is further from its share than one document of any part can move it.
        longest = max(max(s) for s, _ in parts)
        slack = longest * (1 + total / min(w for _, w in parts)) / max(1, tokens)
        assert abs(share - weight / total) <= slack, sizes
    assert sum(entry["tokens"] for entry in whole.describe()) == tokens


def test_rows_of_a_mixture_come_from_all_of_it_and_resume() -> None:
    def make() -> RowPacker:
        mixture = Mixture([live([9] * 10), live([17] * 30)], [3, 1], 1)
        return RowPacker(mixture, length=T, bos=BOS, seed=1, buffer_size=4)

    p = make()
    for _ in range(200):
        p.next_row()
    q = make()
    q.restore(json.loads(json.dumps(p.state())))
    assert all(np.array_equal(a, b) for a, b in zip(p.next_row(), q.next_row(), strict=True))
    assert p.documents.shares == pytest.approx([0.75, 0.25], abs=0.02)
