from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from picollm.data import toy_world
from picollm.data.conversations import Message, Part
from picollm.evaluate import chat, samples
from picollm.evaluate.tasks.toy_world import tasks
from picollm.generate.engine import Engine, Reply, StepOutput
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.tokenizer import Tokenizer


class Oracle:
    """An engine that answers each question as it is told, two at a time and the last one first."""

    capacity = 64

    def __init__(self, answers: dict[tuple[int, ...], str]) -> None:
        self.answers = answers
        self.waiting: list[tuple[int, list[int]]] = []
        self.limits: set[int] = set()
        self.count = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def submit(self, ids: list[int], sampling: Sampling) -> int:
        assert sampling.greedy
        self.limits.add(sampling.max_new_tokens)
        self.count += 1
        self.waiting.append((self.count, ids))
        return self.count

    def step(self) -> list[StepOutput]:
        out = []
        for _ in range(min(2, len(self.waiting))):
            request, ids = self.waiting.pop()
            text = self.answers[tuple(ids)]
            out.append(StepOutput(request, 0, text, Reply([0], text, "stop", (Part("text", text),))))
        return out


def test_toy_world_tasks() -> None:
    found = tasks(100, seed=1)
    assert [task.name for task in found] == [f"{n}_{s}" for n in toy_world.TASKS for s in ("train", "held_out")]
    for task in found:
        held_out = task.name.endswith("held_out")
        known = toy_world.questions(task.name.rsplit("_train")[0].rsplit("_held_out")[0], held_out)
        assert len(task.questions) == min(100, len(known))
        assert len({q.prompt for q in task.questions}) == len(task.questions), "without replacement"
        assert set(task.questions) <= set(known)
        assert all(q.held_out is held_out for q in task.questions)
    again, other = tasks(100, seed=1), tasks(100, seed=2)
    assert [t.questions for t in again] == [t.questions for t in found]
    assert [t.questions for t in other] != [t.questions for t in found]


def test_scores_and_records(tokenizer: Tokenizer) -> None:
    asked = tasks(5, seed=0)
    wrong = asked[0].questions[1]
    answers = {}
    for task in asked:
        for question in task.questions:
            answers[tuple(chat.prompt_ids(tokenizer, question))] = "no idea" if question is wrong else question.answer
    seen: list[int] = []
    oracle = Oracle(answers)
    scores, records = chat.evaluate(oracle, tokenizer, asked, 64, seen.append)  # type: ignore[arg-type]
    total = sum(len(task.questions) for task in asked)
    assert seen[-1] == len(records) == total and seen == sorted(seen)
    assert oracle.limits == {64}
    n = len(asked[0].questions)
    p = (n - 1) / n
    assert scores[asked[0].name] == {"n": n, "score": p, "stderr": pytest.approx(math.sqrt(p * (1 - p) / n))}
    assert all(scores[task.name] == {"n": len(task.questions), "score": 1.0, "stderr": 0.0} for task in asked[1:])
    assert [r["question"] for r in records] == [q.prompt for task in asked for q in task.questions]
    assert [r["question"] for r in records if not r["right"]] == [wrong.prompt]
    assert records[1]["reply"] == "no idea" and records[1]["parts"] == [{"type": "text", "text": "no idea"}]


def test_a_question_that_does_not_fit_is_not_answered(tokenizer: Tokenizer) -> None:
    task = chat.Task("long", (toy_world.Question("sum", False, "word " * 100, "1"),), lambda q, reply: "1" in reply)
    scores, records = chat.evaluate(Oracle({}), tokenizer, [task], 8)  # type: ignore[arg-type]
    assert scores == {"long": {"n": 1, "score": 0.0, "stderr": 0.0}}
    assert records[0]["finish_reason"] == "length"


def test_with_a_real_engine_the_batch_does_not_matter(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    asked = tasks(3, seed=0)
    model = random_model(T=64)
    many = chat.evaluate(Engine(model, tokenizer, 16), tokenizer, asked, 8)
    one = chat.evaluate(Engine(model, tokenizer, 1), tokenizer, asked, 8)
    assert many == one


def test_samples(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    engine = Engine(random_model(T=64), tokenizer, 2)
    seen: list[int] = []
    base = samples.evaluate(engine, tokenizer, chat=False, max_new_tokens=5, on_progress=seen.append)
    assert [record["prompt"] for record in base] == list(samples.OPENINGS)
    assert seen[-1] == len(base)
    asked = samples.evaluate(engine, tokenizer, chat=True, max_new_tokens=5)
    assert [record["prompt"] for record in asked] == list(samples.QUESTIONS)
    ids = render_prompt(tokenizer, (Message("user", (Part("text", samples.QUESTIONS[0]),)),))
    assert asked[0]["text"] == engine.generate([ids], Sampling(max_new_tokens=5))[0].text
    assert samples.evaluate(Engine(random_model(), tokenizer, 1, 3), tokenizer, chat=True, max_new_tokens=5) == []
