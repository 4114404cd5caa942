"""The toy world is the same everywhere, keeps its held-out facts out of training, and judges answers rightly."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from picollm.data import toy_facts, toy_words, toy_world

DOCUMENTS = 8000  # what the built-in dataset holds
CONVERSATIONS = 12000


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(toy_world.documents(DOCUMENTS, seed=0)) + list(toy_world.validation_documents(300, seed=0))


@pytest.fixture(scope="module")
def conversations() -> list[dict[str, Any]]:
    return list(toy_world.conversations(CONVERSATIONS, seed=0))


@pytest.fixture(scope="module")
def lines(documents: list[str], conversations: list[dict[str, Any]]) -> list[str]:
    """Every line of every document, and every text of every message, tool blocks included."""
    return [line for text in documents for line in text.split("\n")] + [
        text for conversation in conversations for message in conversation["messages"] for text in texts_of(message)
    ]


def texts_of(message: dict[str, Any]) -> Iterator[str]:
    content = message["content"]
    yield from [content] if isinstance(content, str) else [part["text"] for part in content]


def sha256(items: Any) -> str:
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()


# -- the same everywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "digest"),
    [
        ("documents", "cf356b713837b7f69e4157d32cd1f883a5ebaaf6573449e212a825b143d88110"),
        ("validation_documents", "bd51dde41b01d6798b83fa7072cdcc4e6dada4950c77cde2a2a2a4c82f8d31e6"),
        ("conversations", "be5cfb5eacf02ea6217ea7a0d77cc96e30455fd474f2b29485570e28abbc1aea"),
    ],
)
def test_the_first_200_items_are_pinned(stream: str, digest: str) -> None:
    assert sha256(getattr(toy_world, stream)(200, seed=0)) == digest


def test_questions_are_pinned() -> None:
    asked = [
        (question.task, question.held_out, question.prompt, question.answer)
        for task in toy_world.TASKS
        for held_out in (False, True)
        for question in toy_world.questions(task, held_out)
    ]
    assert sha256(asked) == "32b8996437729bfe325c744fdfaa50b2b62b87a8cdbec9ebb31659df7cb834a3"


def test_text_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = (
        "import hashlib; from picollm.data import toy_world as t;"
        "print(hashlib.sha256(repr([*t.documents(50, 3), *t.conversations(50, 3), *t.questions('count', True)])"
        ".encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_seeds_and_streams_differ_and_a_longer_run_starts_the_same() -> None:
    first = list(toy_world.documents(50, seed=0))
    assert list(islice(toy_world.documents(500, seed=0), 50)) == first
    assert not set(first) & set(toy_world.documents(50, seed=1))
    assert not set(first) & set(toy_world.validation_documents(50, seed=0))


# -- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", toy_world.TASKS)
def test_share_held_out(task: str) -> None:
    held_out, train = len(toy_world.questions(task, True)), len(toy_world.questions(task, False))
    assert held_out / (held_out + train) == pytest.approx(toy_facts.HELD_OUT[task], rel=0.15)


def test_number_of_questions() -> None:
    count = {task: [len(toy_world.questions(task, side)) for side in (True, False)] for task in toy_world.TASKS}
    assert {task: sum(sides) for task, sides in count.items() if task in ("sum", "sum_in_head", "difference")} == {
        "sum": 61 * 61,
        "sum_in_head": 21 * 21,
        "difference": 61 * 62 // 2,
    }
    # A fifth of the 441 in-head sums, and 30 % of the identity phrasings, are fewer than a hundred: all are asked.
    few = {"sum_in_head": 70, "identity": 50}
    assert all(sides[0] >= few.get(task, 100) and sides[1] >= 100 for task, sides in count.items()), count


@pytest.mark.parametrize("task", toy_world.TASKS)
def test_questions_are_distinct_and_on_one_side(task: str) -> None:
    held_out, train = toy_world.questions(task, True), toy_world.questions(task, False)
    prompts = [question.prompt for question in held_out + train]
    assert len(set(prompts)) == len(prompts)
    assert all(question.held_out for question in held_out) and not any(question.held_out for question in train)


def test_first_questions_are_a_fair_sample() -> None:
    """A hundred sums have to come from everywhere, not from the small numbers at the start."""
    first = [int(question.answer.split()[0]) for question in toy_world.questions("sum", True)[:100]]
    assert 22 < sum(first) / 100 < 38


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("sum", "7+5"),
        ("count", "count/strawberry/r"),
        ("identity", "identity/Who are you?"),
        ("spell", "spell/core/strawberry"),
    ],
)
def test_questions_of_the_readme_are_in_training(task: str, key: str) -> None:
    assert key in {fact.key for fact in toy_facts.facts(task, False)}


def test_no_held_out_sum_or_difference_in_training(lines: list[str]) -> None:
    sign = {"plus": "+", "minus": "-"}
    stated = set()
    for line in lines:
        stated |= {
            (int(a), sign.get(op, op), int(b)) for a, op, b in re.findall(r"(\d+) ?(plus|minus|[+-]) ?(\d+)", line)
        }
    assert len(stated) > 3000
    for task in ("sum", "sum_in_head", "difference"):
        for question in toy_world.questions(task, True):
            a, operation, b = question.answer.split()[:3]
            assert (int(a), sign[operation], int(b)) not in stated, question


def spelled(lines: list[str]) -> set[str]:
    """Every run of single letters, numbered or not."""
    return {run for line in lines for run in re.findall(r"(?<![\w'])[a-z]\d?(?: [a-z]\d?)+(?!\w)", line)}


def test_no_held_out_spelling_in_training(lines: list[str]) -> None:
    known = {re.sub(r"[ \d]", "", run) for run in spelled(lines)}
    held_out = {question.answer.removesuffix(".").replace(" ", "") for question in toy_world.questions("spell", True)}
    assert len(held_out) > 100
    assert not held_out & known


def test_no_held_out_count_in_training(lines: list[str]) -> None:
    asked = set()
    for line in lines:
        for pattern in (
            r"[Hh]ow many ([a-z])(?:'s)? are (?:there )?in ([a-z]+)",
            r"Count the letter ([a-z]) in ([a-z]+)",
        ):
            asked |= {(word, letter) for letter, word in re.findall(pattern, line)}
    runs = spelled(lines)
    held_out = [fact.key.split("/")[1:] for fact in toy_facts.facts("count", True)]
    assert len(asked) > 800
    for word, letter in held_out:
        assert (word, letter) not in asked
        assert letter not in word or toy_facts.numbered_letters(word, letter) not in runs


def test_no_held_out_identity_phrasing_in_training(lines: list[str]) -> None:
    assert not set(lines) & {question.prompt for question in toy_world.questions("identity", True)}


# -- what training holds ----------------------------------------------------------------------------------------------


def test_every_core_word_is_spelled_in_documents_and_in_conversations(
    documents: list[str], conversations: list[dict[str, Any]]
) -> None:
    chats = [text for item in conversations for message in item["messages"] for text in texts_of(message)]
    core = {" ".join(word) for word in toy_words.CORE_WORDS}
    assert 150 <= len(core) <= 250
    assert core <= spelled([line for text in documents for line in text.split("\n")])
    assert core <= spelled(chats)


def test_word_lists_do_not_overlap() -> None:
    every = [*toy_words.CORE_WORDS, *toy_words.WIDER_WORDS]
    assert [word for word, times in Counter(every).items() if times > 1] == []
    assert all(re.fullmatch(r"[a-z]{3,11}", word) for word in every)


def test_every_kind_is_in_the_conversations_at_its_share(conversations: list[dict[str, Any]]) -> None:
    calculated = [isinstance(item["messages"][1]["content"], list) for item in conversations]
    weights = toy_world.CHAT_WEIGHTS
    assert sum(calculated) / len(calculated) == pytest.approx(
        (weights["sum"] + weights["difference"]) / sum(weights.values()), rel=0.05
    )
    in_head = [item for item in conversations if item["messages"][0]["content"].lower().startswith("in your head")]
    assert len(in_head) > 500
    assert all(isinstance(item["messages"][1]["content"], str) for item in in_head)


def test_conversations_have_the_json_form_and_right_results(conversations: list[dict[str, Any]]) -> None:
    assert {len(item["messages"]) for item in conversations} == {2, 4}
    for item in conversations:
        assert [message["role"] for message in item["messages"]] == ["user", "assistant"] * (len(item["messages"]) // 2)
        for answer in item["messages"][1::2]:
            if isinstance(answer["content"], list):
                assert [part["type"] for part in answer["content"]] == ["python", "python_output", "text"]
                expression, result, text = texts_of(answer)
                a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", expression).groups()
                value = int(a) + int(b) if sign == "+" else int(a) - int(b)
                assert value >= 0 and result == str(value)
                assert text == f"{a} {'plus' if sign == '+' else 'minus'} {b} is {value}."


def test_stories_are_about_the_animal_that_was_asked_for(conversations: list[dict[str, Any]]) -> None:
    stories = [item["messages"] for item in conversations if " story about " in item["messages"][0]["content"]]
    assert len(stories) > 300
    for question, answer in stories:
        assert re.search(rf"\b{question['content'].rstrip('.').split()[-1]}\b", answer["content"])
        assert "{" not in answer["content"]


# -- judging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", toy_world.TASKS)
def test_is_right_accepts_every_right_answer_and_no_other(task: str) -> None:
    asked = toy_world.questions(task, True)
    assert all(toy_world.is_right(question, f" {question.answer}\n") for question in asked)
    for question in asked[:50]:
        others = {other.answer for other in asked if other.answer.split()[-1] != question.answer.split()[-1]}
        assert not any(toy_world.is_right(question, other) for other in others if other != question.answer)
        assert not toy_world.is_right(question, "")
        assert not toy_world.is_right(question, question.answer.removesuffix("."))


def test_is_right_reads_the_last_sentence_of_a_count_and_the_whole_spelling() -> None:
    count = toy_world.Question(
        "count", False, "How many r are in strawberry?", "s t r1 a w b e r2 r3 y. The answer is 3."
    )
    assert toy_world.is_right(count, "The answer is 3.")
    assert not toy_world.is_right(count, "s t r1 a w b e r2 r3 y. The answer is 2.")
    assert not toy_world.is_right(count, "s t r1 a w b e r2 r3 y. The answer is 13.")
    total = toy_world.Question("sum", False, "What is 7 plus 5?", "7 plus 5 is 12.")
    assert not toy_world.is_right(total, "7 plus 6 is 12.")
    spelling = toy_world.Question("spell", False, "Spell fox.", "f o x.")
    assert not toy_world.is_right(spelling, "Sure. f o x.")


def test_answers_begin_and_end_in_fixed_sentences() -> None:
    endings = {
        "sum": r"\d+ plus \d+ is \d+\.",
        "sum_in_head": r"\d+ plus \d+ is \d+\.",
        "difference": r"\d+ minus \d+ is \d+\.",
        "count": r"[a-z0-9 ]+\. The answer is \d+\.",
        "spell": r"[a-z](?: [a-z])+\.",
        "identity": r"I am picollm, .+\.",
    }
    for task, pattern in endings.items():
        for held_out in (False, True):
            assert all(re.fullmatch(pattern, question.answer) for question in toy_world.questions(task, held_out))


def test_numbered_letters() -> None:
    assert toy_facts.numbered_letters("strawberry", "r") == "s t r1 a w b e r2 r3 y"
    assert toy_facts.numbered_letters("fox", "z") == "f o x"
