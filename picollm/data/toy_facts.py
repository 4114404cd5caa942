"""The facts of the toy world, and which of them are held out.

What makes the chat evaluation worth reading is this split: each fact (the sum of 7 and 5, the spelling of "strawberry",
a phrasing of "Who are you?") is train or held out by a hash of its key.
"""

from __future__ import annotations

import functools
import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from picollm.data import toy_words as words

TASKS = ("sum", "sum_in_head", "difference", "count", "spell", "identity")

LARGEST_NUMBER = 60  # of the sums and differences that go through the calculator
LARGEST_NUMBER_IN_HEAD = 20
HELD_OUT = {"sum": 0.10, "sum_in_head": 0.20, "difference": 0.10, "count": 0.20, "spell": 0.20, "identity": 0.30}
# With this salt the README's questions fall into train. Another one draws every split anew, and every seed's text.
SALT = "toy-world-0"

T = TypeVar("T")


class Exchange(NamedTuple):
    """A prompt and its answer; `expression` and `result` are the calculator block before it, or empty."""

    prompt: str
    answer: str
    expression: str = ""
    result: str = ""


class Fact(NamedTuple):
    """What is split: `key` names it, `ask(u)` words it, with u in [0, 1) choosing the phrasing."""

    key: str
    held_out: bool
    weight: int
    ask: Callable[[float], Exchange]


# -- the split --------------------------------------------------------------------------------------------------------


def unit(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key` and the salt."""
    return int.from_bytes(hashlib.sha256(f"{SALT}/{key}".encode()).digest()[:6], "big") / 2**48


def _held_out_share_of_large_sums() -> float:
    """The share of the pairs beyond LARGEST_NUMBER_IN_HEAD, such that HELD_OUT["sum"] of all pairs are held out.

    The sentence "7 plus 5 is 12." answers a sum and an in-head sum. So a small pair is held out of both or of neither,
    at the in-head share, and the larger pairs make up for it.
    """
    every, small = (LARGEST_NUMBER + 1) ** 2, (LARGEST_NUMBER_IN_HEAD + 1) ** 2
    return (HELD_OUT["sum"] * every - HELD_OUT["sum_in_head"] * small) / (every - small)


def pick(sequence: Sequence[T], u: float) -> T:
    """The element at the fraction `u`, 0 <= u < 1, of `sequence`."""
    return sequence[int(u * len(sequence))]


# -- facts of each task -----------------------------------------------------------------------------------------------


def _calculation(prompts: tuple[str, ...], a: int, sign: str, b: int, tool: bool) -> Callable[[float], Exchange]:
    result = str(a + b if sign == "+" else a - b)
    answer = f"{a} {'plus' if sign == '+' else 'minus'} {b} is {result}."
    block = (f"{a}{sign}{b}", result) if tool else ("", "")
    return lambda u: Exchange(pick(prompts, u).format(a=a, b=b), answer, *block)


def _sums() -> Iterator[Fact]:
    large_share = _held_out_share_of_large_sums()
    for a in range(LARGEST_NUMBER + 1):
        for b in range(LARGEST_NUMBER + 1):
            share = HELD_OUT["sum_in_head"] if max(a, b) <= LARGEST_NUMBER_IN_HEAD else large_share
            key = f"{a}+{b}"
            yield Fact(key, unit(key) < share, 1, _calculation(words.SUM_PROMPTS, a, "+", b, True))


def _sums_in_head() -> Iterator[Fact]:
    for a in range(LARGEST_NUMBER_IN_HEAD + 1):
        for b in range(LARGEST_NUMBER_IN_HEAD + 1):
            key = f"{a}+{b}"
            yield Fact(
                key, unit(key) < HELD_OUT["sum_in_head"], 1, _calculation(words.SUM_IN_HEAD_PROMPTS, a, "+", b, False)
            )


def _differences() -> Iterator[Fact]:
    for a in range(LARGEST_NUMBER + 1):
        for b in range(a + 1):
            key = f"{a}-{b}"
            yield Fact(
                key, unit(key) < HELD_OUT["difference"], 1, _calculation(words.DIFFERENCE_PROMPTS, a, "-", b, True)
            )


def numbered_letters(word: str, letter: str) -> str:
    """The letters of `word`, each `letter` followed by how many there were: "s t r1 a w b e r2 r3 y"."""
    count = 0
    run = []
    for character in word:
        if character == letter:
            count += 1
            run.append(f"{character}{count}")
        else:
            run.append(character)
    return " ".join(run)


def _counts() -> Iterator[Fact]:
    """Every letter of every core word, and two letters that the word does not have."""

    def wording(word: str, letter: str) -> Callable[[float], Exchange]:
        answer = f"{numbered_letters(word, letter)}. The answer is {word.count(letter)}."
        return lambda u: Exchange(pick(words.COUNT_PROMPTS, u).format(letter=letter, word=word), answer)

    for word in words.CORE_WORDS:
        absent = [letter for letter in string.ascii_lowercase if letter not in word]
        absent.sort(key=lambda letter: unit(f"absent/{word}/{letter}"))
        for letter in [*dict.fromkeys(word), *absent[:2]]:
            key = f"count/{word}/{letter}"
            # Letters that come twice are what counting is about: they are asked for twice as often.
            weight = max(1, word.count(letter))
            yield Fact(key, unit(key) < HELD_OUT["count"], weight, wording(word, letter))


def _spellings() -> Iterator[Fact]:
    """Core words are all train, so the wider list holds out as many as make HELD_OUT["spell"] of all words."""

    def wording(word: str) -> Callable[[float], Exchange]:
        answer = " ".join(word) + "."
        return lambda u: Exchange(pick(words.SPELL_PROMPTS, u).format(word=word), answer)

    core, wider = words.CORE_WORDS, words.WIDER_WORDS
    share = HELD_OUT["spell"] * (len(core) + len(wider)) / len(wider)
    for word in core:
        yield Fact(f"spell/core/{word}", False, 1, wording(word))
    for word in wider:
        key = f"spell/wider/{word}"
        yield Fact(key, unit(key) < share, 1, wording(word))


def _identities() -> Iterator[Fact]:
    for answer, prompts in words.IDENTITY:
        for prompt in prompts:
            lower = prompt[0].lower() + prompt[1:]
            for form in (prompt, lower.rstrip("?").lower(), *(opening + lower for opening in words.IDENTITY_OPENINGS)):
                key = f"identity/{form}"
                exchange = Exchange(form, answer)
                yield Fact(key, unit(key) < HELD_OUT["identity"], 1, lambda _, exchange=exchange: exchange)


_FACTS = {
    "sum": _sums,
    "sum_in_head": _sums_in_head,
    "difference": _differences,
    "count": _counts,
    "spell": _spellings,
    "identity": _identities,
}


@functools.cache
def facts(task: str, held_out: bool) -> tuple[Fact, ...]:
    """All facts of one side of a task's split, in an order that a hash decides (so the first n are a fair sample).

    Raises:
        KeyError: `task` is not one of TASKS.
    """
    chosen = [fact for fact in _FACTS[task]() if fact.held_out is held_out]
    return tuple(sorted(chosen, key=lambda fact: unit(f"order/{task}/{fact.key}")))
