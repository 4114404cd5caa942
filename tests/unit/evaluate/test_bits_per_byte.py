from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from picollm.data import toy_world
from picollm.errors import ConfigError
from picollm.evaluate import bits_per_byte
from picollm.model.gpt import GPT
from picollm.tokenizer.tokenizer import Tokenizer

DOCUMENTS = [*toy_world.validation_documents(12, 3), "", "Grüße, 東京 🙂", "x"]


def by_hand(model: GPT, tokenizer: Tokenizer, documents: list[str], T: int) -> list[float]:
    """Nats per document, one piece at a time, straight from the definition."""
    found = []
    for document in documents:
        ids = tokenizer.encode(document)
        nats = 0.0
        for start in range(0, len(ids), T):
            row = torch.tensor([[tokenizer.bos, *ids[start : start + T]]])
            log_p = model(row[:, :-1]).log_softmax(-1)
            nats -= float(log_p.gather(-1, row[:, 1:, None]).sum(dtype=torch.float64))
        found.append(nats)
    return found


def test_rows_hold_every_token_once(tokenizer: Tokenizer) -> None:
    rows = list(bits_per_byte.rows(tokenizer, DOCUMENTS, 16))
    assert all(row[0] == tokenizer.bos and 2 <= len(row) <= 17 for _, row in rows)
    for index, document in enumerate(DOCUMENTS):
        ids = [token for i, row in rows if i == index for token in row[1:].tolist()]
        assert tokenizer.decode(ids) == document


def test_max_tokens_cuts(tokenizer: Tokenizer) -> None:
    rows = list(bits_per_byte.rows(tokenizer, DOCUMENTS, 16, max_tokens=101))
    whole = list(bits_per_byte.rows(tokenizer, DOCUMENTS, 16))
    assert sum(len(row) - 1 for _, row in rows) == 101
    assert np.concatenate([r[1:] for _, r in rows]).tolist() == np.concatenate([r[1:] for _, r in whole]).tolist()[:101]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equals_the_definition(random_model: Callable[..., GPT], tokenizer: Tokenizer, batch_size: int) -> None:
    model = random_model(T=32)
    nats = by_hand(model, tokenizer, DOCUMENTS, 32)
    num_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    found = bits_per_byte.evaluate(model, tokenizer, DOCUMENTS, 32, batch_size)
    assert found.bytes == num_bytes
    assert found.nats == pytest.approx(sum(nats), rel=1e-5)
    assert found.bpb == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert found.tokens == sum(len(tokenizer.encode(document)) for document in DOCUMENTS)


def test_uniform_model_has_log2_vocabulary_bits_per_token(
    random_model: Callable[..., GPT], tokenizer: Tokenizer
) -> None:
    model = random_model(T=32)
    model.lm_head.zero_()
    found = bits_per_byte.evaluate(model, tokenizer, DOCUMENTS, 32, 8)
    assert found.bpb == pytest.approx(found.tokens * math.log2(tokenizer.vocab_size) / found.bytes, rel=1e-6)


def test_stderr_is_that_of_resampled_documents(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    """The formula against a bootstrap over documents."""
    model = random_model(T=32)
    documents = list(toy_world.validation_documents(60, 5))
    nats = np.array(by_hand(model, tokenizer, documents, 32))
    sizes = np.array([len(document.encode()) for document in documents])
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 60, size=(4000, 60))
    bootstrap = (nats[picks].sum(1) / sizes[picks].sum(1) / math.log(2)).std()
    found = bits_per_byte.evaluate(model, tokenizer, documents, 32, 16)
    assert found.documents == 60
    assert found.stderr == pytest.approx(bootstrap, rel=0.1)


def test_one_document_has_no_stderr(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    assert bits_per_byte.evaluate(random_model(T=32), tokenizer, ["Hello."], 32, 4).stderr is None


def test_no_text_is_an_error(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError):
        bits_per_byte.evaluate(random_model(T=32), tokenizer, ["", ""], 32, 4)


def test_progress_may_stop_the_pass(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    seen: list[int] = []

    def look(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bits_per_byte.evaluate(random_model(T=32), tokenizer, DOCUMENTS, 32, 2, on_progress=look)
    assert len(seen) == 2 and seen[0] <= seen[1] < len(DOCUMENTS)


def test_progress_ends_at_the_number_of_documents(
    random_model: Callable[..., GPT], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits_per_byte, "WINDOW_ROWS", 3)  # long documents lie in several windows
    seen: list[int] = []
    bits_per_byte.evaluate(random_model(T=32), tokenizer, DOCUMENTS, 32, 1, on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == len(DOCUMENTS)
