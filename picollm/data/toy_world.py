"""The toy world: a corpus and conversations that are generated, so that the first run needs no network and no files.

Six scored tasks, stories and a little small talk. Which facts are held out is decided in `toy_facts.py`; they are in no
document and no conversation, in any wording, so a right answer to one was not remembered.

Same seed, same text, on every machine and Python version: all choices come from `random.Random.random()`, the one
method whose sequence Python promises to keep, and from SHA-256.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from picollm.data import toy_words as words
from picollm.data.toy_facts import SALT, TASKS, Exchange, Fact, facts, pick, unit

__all__ = ["TASKS", "Question", "conversations", "documents", "is_right", "questions", "validation_documents"]

T = TypeVar("T")

# How often each kind is asked in a conversation. Counting needs most: a word's letters have to be known before the
# right ones can be numbered. Sums and differences are copied into the calculator and back, which is learnt early. Core
# words are spelled more often than the wider list, because counting builds on them. In-head sums are mostly remembered;
# more of them would cost the others. Small talk is a handful of lines.
CHAT_WEIGHTS = {
    "sum": 2.5,
    "difference": 1.5,
    "sum_in_head": 1.0,
    "count": 5.0,
    "spell_core": 1.5,
    "spell_wider": 0.5,
    "identity": 2.0,
    "story": 1.0,
    "small_talk": 0.3,
}
# Two exchanges have to fit into a row of 128 tokens: stories, the longest answers, stand alone.
DIALOGUE_WEIGHTS = {kind: weight for kind, weight in CHAT_WEIGHTS.items() if kind != "story"}
# Kinds of document. Stories are what makes it a corpus; the rest prepares the answers in the words they are given in.
DOCUMENT_WEIGHTS = {
    "stories": 0.36,
    "calculations": 0.12,
    "sums_in_head": 0.08,
    "spellings": 0.12,
    "counts": 0.20,
    "dialogue": 0.12,
}
# Every fifth conversation asks a second question, so that a chat does not end after its first answer.
SECOND_TURN_SHARE = 0.2


@dataclass(frozen=True)
class Question:
    """One question of the chat evaluation. `answer` is the reply's text, without a calculator block."""

    task: str
    held_out: bool
    prompt: str
    answer: str


def questions(task: str, held_out: bool) -> list[Question]:
    """One question for each fact, in a fixed shuffled order: the first n are a sample without replacement.

    Args:
        task: one of TASKS.
        held_out: ask for facts that no document and no conversation contains, else for those of training.

    Raises:
        KeyError: `task` is not one of TASKS.
    """
    return [
        Question(task, held_out, exchange.prompt, exchange.answer)
        for fact in facts(task, held_out)
        for exchange in [fact.ask(unit(f"phrasing/{task}/{fact.key}"))]
    ]


def _last_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+", text.strip())[-1]


def is_right(question: Question, reply_text: str) -> bool:
    """Whether `reply_text` (without a calculator block) answers `question`.

    Sums, differences and counts are judged by their last sentence; spellings and identity by the whole text.
    """
    if question.task in ("spell", "identity"):
        return reply_text.strip() == question.answer
    return _last_sentence(reply_text) == _last_sentence(question.answer)


# -- random text ------------------------------------------------------------------------------------------------------


@functools.cache
def _pool(kind: str) -> tuple[Fact, ...]:
    """Train facts of a kind, repeated by weight, so that one uniform draw picks with the weights."""
    task, _, part = kind.partition("_") if kind.startswith("spell_") else (kind, "", "")
    chosen = [fact for fact in facts(task, False) if not part or fact.key.startswith(f"spell/{part}/")]
    return tuple(fact for fact in chosen for _ in range(fact.weight))


@functools.cache
def _cumulative(weights: tuple[tuple[str, float], ...]) -> tuple[list[str], list[float]]:
    return [kind for kind, _ in weights], list(itertools.accumulate(weight for _, weight in weights))


class _Stream:
    """Random text of one seed. A stream's name keeps documents, validation and conversations apart at equal seeds."""

    def __init__(self, name: str, seed: int) -> None:
        digest = hashlib.sha256(f"{SALT}/stream/{name}/{seed}".encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big")).random

    def pick(self, sequence: Sequence[T]) -> T:
        return pick(sequence, self.random())

    def pick_kind(self, weights: Mapping[str, float]) -> str:
        """A key of `weights`, as often as its share of their sum."""
        kinds, cumulative = _cumulative(tuple(weights.items()))
        return kinds[bisect.bisect_right(cumulative, self.random() * cumulative[-1])]

    def exchange(self, kind: str) -> Exchange:
        """A question and its answer, of a train fact, a story or small talk."""
        if kind == "story":
            animal = self.pick(words.ANIMALS)
            return Exchange(self.pick(words.STORY_PROMPTS).format(animal=animal), self.story(animal))
        if kind == "small_talk":
            answer, prompts = self.pick(words.SMALL_TALK)
            return Exchange(self.pick(prompts), answer)
        return self.pick(_pool(kind)).ask(self.random())

    def story(self, animal: str) -> str:
        """Three to five sentences in which `animal` takes part."""
        name = self.pick(words.NAMES)
        friend = self.pick(words.NAMES)
        while friend == name:
            friend = self.pick(words.NAMES)
        return self.pick(words.STORIES).format(
            name=name,
            friend=friend,
            animal=animal,
            mood=self.pick(words.MOODS),
            color=self.pick(words.COLORS),
            other_color=self.pick(words.COLORS),
            place=self.pick(words.PLACES),
            thing=self.pick(words.THINGS),
        )

    def document(self) -> str:
        """One pretraining text, of about 80 tokens."""
        kind = self.pick_kind(DOCUMENT_WEIGHTS)
        if kind == "stories":
            return "\n".join([self.story(self.pick(words.ANIMALS)), self.story(self.pick(words.ANIMALS))])
        if kind == "sums_in_head":
            return " ".join(self.exchange("sum_in_head").answer for _ in range(8))
        if kind == "calculations":
            asked = [self.exchange("sum" if self.random() < 0.6 else "difference") for _ in range(5)]
        elif kind == "spellings":
            asked = [self.exchange("spell_core" if self.random() < 0.8 else "spell_wider") for _ in range(6)]
        elif kind == "counts":
            asked = [self.exchange("count") for _ in range(3)]
        else:
            asked = [self.exchange(self.pick_kind(DIALOGUE_WEIGHTS)) for _ in range(4)]
        return "\n".join(map(_as_plain_text, asked))

    def conversation(self) -> dict[str, Any]:
        """One conversation in its JSON form, with one or two questions."""
        kind = self.pick_kind(CHAT_WEIGHTS)
        messages = _as_messages(self.exchange(kind))
        if kind != "story" and self.random() < SECOND_TURN_SHARE:
            messages += _as_messages(self.exchange(self.pick_kind(DIALOGUE_WEIGHTS)))
        return {"messages": messages}


def _as_plain_text(exchange: Exchange) -> str:
    """Question and answer on lines of their own, so that both start as in a chat; "7+5=12." is the calculator."""
    block = f"{exchange.expression}={exchange.result}. " if exchange.expression else ""
    return f"{exchange.prompt}\n{block}{exchange.answer}"


def _as_messages(exchange: Exchange) -> list[dict[str, Any]]:
    content: str | list[dict[str, str]] = exchange.answer
    if exchange.expression:
        content = [
            {"type": "python", "text": exchange.expression},
            {"type": "python_output", "text": exchange.result},
            {"type": "text", "text": exchange.answer},
        ]
    return [{"role": "user", "content": exchange.prompt}, {"role": "assistant", "content": content}]


# -- what others call -------------------------------------------------------------------------------------------------


def documents(num: int, seed: int) -> Iterator[str]:
    """Yield `num` pretraining texts, which state train facts only. The first n are the same for every `num` >= n."""
    stream = _Stream("documents", seed)
    return (stream.document() for _ in range(num))


def validation_documents(num: int, seed: int) -> Iterator[str]:
    """Yield `num` texts of the same distribution as `documents`, train facts only, drawn apart from it."""
    stream = _Stream("validation_documents", seed)
    return (stream.document() for _ in range(num))


def conversations(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `num` conversations, one JSON object `{"messages": [...]}` each, about train facts only.

    `content` is a string, or for an answer with a calculator call a list of parts `python`, `python_output`, `text`.
    """
    stream = _Stream("conversations", seed)
    return (stream.conversation() for _ in range(num))
