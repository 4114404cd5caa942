"""Who owns what: every matrix once, whole, in balance, in the order of backward."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from picollm.optim.sharding import backward_order, pack, row_range

C = 128


def matrices(layers: int, *, kv_share: int = 1, gates: bool = False) -> dict[str, tuple[int, int]]:
    """Names and shapes of a model's matrices in the order of backward."""
    shapes = {}
    for layer in range(layers):
        keys = C // kv_share
        block = {"q_proj": (C, C), "k_proj": (keys, C), "v_proj": (keys, C), "o_proj": (C, C)}
        shapes |= {f"layers.{layer}.attention.{name}.weight": shape for name, shape in block.items()}
        if gates and layer % 2:
            shapes[f"layers.{layer}.attention.value_gate.weight"] = (4, 12)
        shapes |= {f"layers.{layer}.mlp.up_proj.weight": (4 * C, C), f"layers.{layer}.mlp.down_proj.weight": (C, 4 * C)}
    return {name: shapes[name] for name in backward_order(shapes)}


@pytest.mark.parametrize(
    ("layers", "kv_share", "gates", "world"),
    list(itertools.product((1, 3, 12), (1, 4), (False, True), (1, 2, 3, 8))),
)
def test_every_matrix_has_one_owner(layers: int, kv_share: int, gates: bool, world: int) -> None:
    shapes = matrices(layers, kv_share=kv_share, gates=gates)
    buckets = pack(shapes, world)
    assert all(len(bucket) == world for bucket in buckets)
    assert sorted(name for bucket in buckets for slot in bucket for name in slot) == sorted(shapes)
    if world == 1:
        assert len(buckets) == 1
        return
    # A bucket is a run of the order, so that none waits for a gradient that comes after the next bucket's.
    order = list(shapes)
    positions = [[order.index(name) for slot in bucket for name in slot] for bucket in buckets]
    assert all(max(before) < min(after) for before, after in itertools.pairwise(positions))
    room = 4 * C * C + sum(prod(shape) for shape in shapes.values() if prod(shape) < 1000)
    assert all(sum(prod(shapes[name]) for name in slot) <= room for bucket in buckets for slot in bucket)


def iteration_flops(shape: tuple[int, int]) -> int:
    """Of one Polar Express iteration: Gram matrix, its square, and the product with the matrix."""
    m, n = min(shape), max(shape)
    return 4 * m * m * n + 2 * m**3


@pytest.mark.parametrize(("layers", "worst"), [(12, 1.14), (20, 1.09), (24, 1.001)])
def test_eight_ranks_share_elements_and_work(layers: int, worst: float) -> None:
    """The busiest rank against the mean at the depths that are trained on 8 GPUs."""
    shapes = matrices(layers)
    buckets = pack(shapes, 8)
    for measure in (prod, iteration_flops):
        load = [sum(measure(shapes[name]) for bucket in buckets for name in bucket[rank]) for rank in range(8)]
        assert max(load) <= worst * sum(load) / 8, (measure, load)


def test_equal_shapes_are_neighbours() -> None:
    shapes = matrices(3, kv_share=4)
    for bucket in pack(shapes, 2):
        for slot in bucket:
            runs = [shape for shape, _ in itertools.groupby(shapes[name] for name in slot)]
            assert len(runs) == len(set(runs))


def test_backward_completes_the_head_first_and_the_embedding_last() -> None:
    names = [
        "embed_tokens", "resid_theta", "lm_head", "layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight",
        "layers.1.mlp.down_proj.weight", "layers.10.mlp.up_proj.weight", "value_embeds.1", "value_embeds.10",
    ]  # fmt: skip
    assert backward_order(names) == [
        "lm_head", "value_embeds.10", "layers.10.mlp.up_proj.weight", "value_embeds.1", "layers.1.mlp.down_proj.weight",
        "layers.1.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight", "resid_theta", "embed_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "world"), [(128, 1), (128, 3), (128, 8), (5, 4), (3, 8)])
def test_rows_are_cut_into_equal_runs(rows: int, world: int) -> None:
    ranges = [row_range(rows, rank, world) for rank in range(world)]
    assert ranges[0][0] == 0 and ranges[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert max(end - start for start, end in ranges) == -(-rows // world)
