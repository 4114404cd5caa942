from __future__ import annotations

import pytest

from picollm.tokenizer.quality import evaluate
from picollm.tokenizer.samples import NASTY, SAMPLES
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.tokenizer.train import train


def test_counts_of_a_byte_tokenizer_are_known():
    only_bytes = train(iter(["q"]), 265)
    quality = evaluate(only_bytes, {"validation": ["abc", "é"]})
    kind = quality.kinds["validation"]
    assert (kind.documents, kind.chars, kind.bytes, kind.tokens, kind.bytes_per_token) == (2, 4, 5, 5, 1.0)
    assert all(found.bytes_per_token == 1.0 for found in quality.kinds.values())
    assert quality.unknown_bytes == 0
    assert quality.round_trip_failed == ()
    assert quality.round_trip_texts == 2 + len(NASTY) + sum(map(len, SAMPLES.values()))


def test_kinds_and_shares(tokenizer: Tokenizer):
    quality = evaluate(tokenizer, {"validation": iter(["The cat sat."] * 600)})
    assert list(quality.kinds) == ["validation", "prose", "code", "numbers", "other scripts"]
    assert quality.kinds["validation"].documents == 600
    assert quality.kinds["prose"].bytes_per_token > quality.kinds["other scripts"].bytes_per_token >= 1
    assert 0 < quality.unused_share < 1
    assert quality.to_dict()["kinds"]["code"]["tokens"] == quality.kinds["code"].tokens


def test_a_kind_without_text_is_left_out(tokenizer: Tokenizer):
    assert "validation" not in evaluate(tokenizer, {"validation": []}).kinds


def test_a_lossy_tokenizer_is_noticed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    encode = tokenizer._encode_batch
    monkeypatch.setattr(tokenizer, "_encode_batch", lambda texts: encode([text.strip() for text in texts]))
    quality = evaluate(tokenizer, {})
    assert " " in quality.round_trip_failed


def test_special_ids_from_text_are_noticed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer._backend, "encode_special_tokens", False)
    failed = evaluate(tokenizer, {}).round_trip_failed
    assert any("<|bos|>" in text for text in failed)
