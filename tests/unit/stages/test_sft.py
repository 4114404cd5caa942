"""Mixing conversations by weight, and the loss over the ones that were held back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from picollm.data import toy_world
from picollm.data.conversations import Conversation
from picollm.model.gpt import GPT
from picollm.stages.sft import (
    VALIDATION_ROWS,
    learnable,
    tokens_of,
    validation_loss,
    validation_mix,
    validation_rows,
)
from picollm.tokenizer.chat_format import render
from picollm.tokenizer.tokenizer import Tokenizer


def talks(word: str, num: int) -> list[Conversation]:
    return [
        Conversation.from_json(
            {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "yes"}]}
        )
        for i in range(num)
    ]


def mixed(sizes: dict[str, int], weights: list[float], seed: int = 0) -> list[Conversation]:
    parts: list[Any] = [SimpleNamespace(conversations=lambda _, n=n, w=w: talks(w, n)) for w, n in sizes.items()]
    sources = [SimpleNamespace(dataset=name, weight=w) for name, w in zip(sizes, weights, strict=True)]
    recipe: Any = SimpleNamespace(seed=seed, data=sources)
    return validation_mix(parts, recipe)


def words(conversations: list[Conversation]) -> Counter[str]:
    return Counter(conversation.messages[0].text.split()[0] for conversation in conversations)


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ({"a": 100, "b": 100}, [1.0, 1.0], {"a": 100, "b": 100}),
        ({"a": 100, "b": 20}, [1.0, 1.0], {"a": 100, "b": 100}),  # the small one is repeated
        ({"a": 100, "b": 20}, [3.0, 1.0], {"a": 100, "b": 33}),
        ({"a": 100, "b": 90}, [10.0, 1.0], {"a": 900, "b": 90}),  # the one with most for its weight stays whole
        ({"a": 100, "b": 0}, [1.0, 1.0], {"a": 100}),
    ],
)
def test_shares_follow_the_weights(sizes: dict[str, int], weights: list[float], expected: dict[str, int]) -> None:
    assert words(mixed(sizes, weights)) == expected


def test_every_conversation_is_repeated_about_as_often() -> None:
    found = mixed({"a": 100, "b": 30}, [1.0, 1.0])
    times = Counter(c.messages[0].text for c in found if c.messages[0].text.startswith("b"))
    assert set(times.values()) == {3, 4} and sum(times.values()) == 100


def test_the_mixture_is_the_same_for_the_same_seed() -> None:
    sizes, weights = {"a": 100, "b": 30}, [1.0, 1.0]
    assert mixed(sizes, weights) == mixed(sizes, weights) != mixed(sizes, weights, seed=1)


def test_sources_do_not_stay_together() -> None:
    """Only so many rows are scored, and all sources are to be among them."""
    found = words(mixed({"a": 2000, "b": 2000}, [1.0, 1.0])[:1000])
    assert 400 < found["a"] < 600


def test_one_source_is_taken_as_it_is() -> None:
    assert mixed({"a": 5}, [0.3]) == talks("a", 5)


def test_validation_loss_is_that_of_one_row_after_another(
    random_model: Callable[..., GPT], tokenizer: Tokenizer
) -> None:
    model = random_model(T=64)
    conversations = [Conversation.from_json(talk) for talk in toy_world.conversations(20, 5)]
    rows = validation_rows(conversations, tokenizer, 64)
    nats, count = 0.0, 0
    for ids, targets in rows:
        log_p = model(torch.from_numpy(ids)[None].long())[0].log_softmax(-1)
        wanted = torch.from_numpy(targets).long()
        nats -= float(log_p[wanted >= 0].gather(-1, wanted[wanted >= 0][:, None]).sum(dtype=torch.float64))
        count += int((wanted >= 0).sum())
    shares: list[float] = []
    assert validation_loss(model, rows, on_progress=shares.append) == pytest.approx(nats / count, rel=1e-6)
    assert shares == [1.0]  # 64 rows in a pass


def test_validation_rows_hold_as_many_conversations_as_there_are(tokenizer: Tokenizer) -> None:
    """However few: neither one row, nor as many as suit a batch of some size."""
    conversations = talks("a", 30)
    rows = validation_rows(conversations, tokenizer, 64)
    size = len(render(tokenizer, conversations[0])[0])
    assert len(rows) * (64 // size) >= 30 > (len(rows) - 1) * (64 // size)
    assert len(validation_rows(conversations * 300, tokenizer, 64)) == VALIDATION_ROWS


@pytest.mark.parametrize("num", [3, 30, 100])
def test_validation_rows_hold_every_conversation_once(num: int, tokenizer: Tokenizer) -> None:
    """Long ones fit first: with more of them to choose from, they would be scored twice and short ones not at all."""
    conversations = [Conversation.from_json(talk) for talk in toy_world.conversations(num, 5)]
    rows = validation_rows(conversations, tokenizer, 256)
    scored = Counter(int(token) for _, targets in rows for token in targets[targets >= 0])
    wanted: Counter[int] = Counter()
    for conversation in conversations:
        ids, mask = render(tokenizer, conversation)
        assert len(ids) <= 256
        wanted.update(token for token, carries in zip(ids, mask, strict=True) if carries)
    assert scored == wanted


def test_conversations_without_a_trained_token_are_left_out_and_counted(tokenizer: Tokenizer) -> None:
    short, long = talks("a", 3), talks("word " * 40, 2)
    mixed = short * 2 + long * 5  # a mixture repeats; the count is of different ones
    assert learnable(mixed, tokenizer, 16) == (short * 2, 2)
    assert learnable(mixed, tokenizer, 2048) == (mixed, 0)
    assert learnable([], tokenizer, 16) == ([], 0)


@pytest.mark.parametrize("length", [16, 40])
def test_rows_hold_a_trained_token_whatever_the_model_reads(tokenizer: Tokenizer, length: int) -> None:
    endless = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so " * 99}]}
    every = [*talks("word " * 12, 20), *talks("a", 20), Conversation.from_json(endless)]
    kept, left_out = learnable(every, tokenizer, length)
    assert left_out == (20 if length == 16 else 0)
    source = tokens_of(kept, tokenizer, length)
    sizes = source.lengths(range(len(kept)))
    assert min(sizes) > 0 and max(sizes) == length
    for document, size in enumerate(sizes):
        ids, mask = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=bool)
        source.copy(document, 0, ids, mask)
        assert mask.any()


def test_without_conversations_there_is_no_validation_loss(
    random_model: Callable[..., GPT], tokenizer: Tokenizer
) -> None:
    model = random_model(T=8)
    # The question alone fills the row: no token of an answer is left to score.
    long = talks("word " * 40, 3)
    for conversations in ([], long):
        assert validation_loss(model, validation_rows(conversations, tokenizer, 8)) is None
