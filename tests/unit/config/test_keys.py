from __future__ import annotations

from picollm.config.keys import flatten, nest

TREE = {"train": {"steps": 3, "rates": {"matrix": 0.1}}, "seed": 1, "sft": {"mix": [{"dataset": "a"}]}, "empty": {}}
FLAT = {"train.steps": 3, "train.rates.matrix": 0.1, "seed": 1, "sft.mix": [{"dataset": "a"}], "empty": {}}


def test_every_leaf_has_a_dotted_key_and_a_way_back() -> None:
    assert dict(flatten(TREE)) == FLAT
    assert nest(FLAT) == TREE
