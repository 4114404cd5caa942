"""What can be exported to what, by features and by tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from picollm.config.model import Architecture
from picollm.export.features import GGUF, REMOTE_CODE, TARGETS, TRANSFORMERS, blockers, exports


def test_portable_goes_everywhere(small: Callable[..., Architecture]) -> None:
    assert blockers(small()) == {target: [] for target in TARGETS}
    assert all(export.possible for export in exports(small()).values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 128, "window_pattern": "SL"}, "model.window_pattern"),
        ({"final_logit_softcapping": 15.0}, "model.logit_softcap"),
        ({"value_embeddings": True}, "model.value_embeddings"),
        ({"x0_scalars": True}, "model.x0_scalars"),
        ({"smear": True}, "model.smear"),
        ({"backout": True}, "model.backout"),
    ],
)
def test_each_feature_blocks_the_stock_formats_alone(
    small: Callable[..., Architecture], changes: dict[str, object], named: str
) -> None:
    found = blockers(small(**changes))
    assert len(found[GGUF]) == len(found[TRANSFORMERS]) == 1 and found[REMOTE_CODE] == []
    assert named in found[GGUF][0]
    possible = exports(small(**changes))
    assert [possible[target].possible for target in TARGETS] == [False, False, True]
    assert named in possible[TRANSFORMERS].reason and "model.arch=portable" in possible[TRANSFORMERS].reason


def test_a_window_that_no_layer_has_blocks_nothing(small: Callable[..., Architecture]) -> None:
    assert blockers(small(sliding_window=128, window_pattern="L"))[GGUF] == []


def test_pairs_of_digits_block_gguf_only(small: Callable[..., Architecture]) -> None:
    found = exports(small(), digits=2)
    assert [found[target].possible for target in TARGETS] == [False, True, True]
    assert "tokenizer.digits" in found[GGUF].reason and "model.arch" not in found[GGUF].reason
    assert all(export.possible for digits in (1, 3) for export in exports(small(), digits=digits).values())


def test_single_bytes_block_gguf_only(small: Callable[..., Architecture]) -> None:
    """llama.cpp refuses a file without merges."""
    found = exports(small(vocab_size=265))
    assert [found[target].possible for target in TARGETS] == [False, True, True]
    assert "merges nothing" in found[GGUF].reason and "model.arch" not in found[GGUF].reason
    assert exports(small(vocab_size=266))[GGUF].possible


@pytest.mark.parametrize(
    ("hidden", "inside", "word"),
    [
        (256, 1024, "every feature"), (64, 256, "get another type"), (64, 128, "all but K-quants"), (72, 200, "F16"),
    ],
)  # fmt: skip
def test_the_reason_names_types_that_rows_are_too_odd_for(
    small: Callable[..., Architecture], hidden: int, inside: int, word: str
) -> None:
    arch = small(hidden_size=hidden, intermediate_size=inside, head_dim=hidden // 4)
    assert exports(arch)[GGUF].possible and word in exports(arch)[GGUF].reason
