"""Chat tasks: ask, decode greedily, judge the reply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from picollm.data.conversations import Message, Part
from picollm.generate.engine import Engine, Reply
from picollm.generate.sampler import Sampling
from picollm.generate.session import parts_to_json
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.tokenizer import Tokenizer


class Question(Protocol):
    """What a task asks; how it is judged is the task's affair."""

    @property
    def prompt(self) -> str: ...


@dataclass(frozen=True)
class Task:
    """A named list of questions; `is_right(question, reply)` judges the visible text of a reply."""

    name: str
    questions: tuple[Any, ...]
    is_right: Callable[[Any, str], bool]


def prompt_ids(tokenizer: Tokenizer, question: Question) -> list[int]:
    """A question as the only user turn, ready for the assistant's answer."""
    return render_prompt(tokenizer, (Message("user", (Part("text", question.prompt),)),))


def score(right: int, total: int) -> dict[str, float | int]:
    """`{"n", "score", "stderr"}`: share of right answers and its binomial standard error, sqrt(p (1 - p) / n)."""
    share = right / total
    return {"n": total, "score": share, "stderr": math.sqrt(share * (1 - share) / total)}


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    max_new_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, dict[str, float | int]], list[dict[str, Any]]]:
    """Score tasks; the questions of all of them share the engine, so that its slots stay full.

    Args:
        max_new_tokens: longest reply, tool block included.
        on_progress: called with the number of finished questions after each step; what it raises ends the suite.

    Returns:
        task name -> `{"n", "score", "stderr"}`, and one record per question in the tasks' order:
        `{"task", "question", "reply", "right", "finish_reason", "parts"}`.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    records: list[dict[str, Any]] = []
    index_of: dict[int, int] = {}
    asked = [(task, question) for task in tasks for question in task.questions]
    for index, (task, question) in enumerate(asked):
        # Stands unless a reply replaces it: a question that does not fit the context cannot be answered.
        records.append(_record(task, question, Reply([], "", "length", ())))
        ids = prompt_ids(tokenizer, question)
        if len(ids) <= engine.capacity:
            index_of[engine.submit(ids, sampling)] = index
    finished = len(asked) - len(index_of)
    while engine.busy:
        for output in engine.step():
            if output.reply is not None:
                index = index_of[output.request_id]
                records[index] = _record(*asked[index], output.reply)
                finished += 1
        if on_progress is not None:
            on_progress(finished)
    scores = {
        task.name: score(sum(r["right"] for r in records if r["task"] == task.name), len(task.questions))
        for task in tasks
    }
    return scores, records


def _record(task: Task, question: Question, reply: Reply) -> dict[str, Any]:
    return {
        "task": task.name,
        "question": question.prompt,
        "reply": reply.text,
        "right": bool(task.is_right(question, reply.text)),
        "finish_reason": reply.finish_reason,
        "parts": parts_to_json(reply.parts),
    }
