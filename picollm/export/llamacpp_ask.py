"""Everything that a check wants to know from llama.cpp, asked in a process of its own.

    python -m picollm.export.llamacpp_ask FOLDER      reads FOLDER/question.json, writes answer.json and log_probs.npy

A process of its own, because a runtime may take its process down (on some machines the CPU promises matrix
instructions, AMX, that end the process in quantised products), and because its memory then ends with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picollm.errors import HostError, PicollmError
from picollm.export.llamacpp import Runtime
from picollm.export.strings import STRINGS

# Each thread of the server that answers in full would keep a heap of glibc's own, of some 20 MB for its JSON.
_ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
_QUESTION, _ANSWER, _LOG_PROBS = "question.json", "answer.json", "log_probs.npy"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        step: every so many positions of the rows are told in full, the others by their most likely token.
        conversations: messages whose prompts are wanted; none of a base model.
        prompts: ids to continue, as far as `reply_tokens` and the context go.
    """

    path: str
    context: int
    threads: int
    vocab_size: int
    rows: list[list[int]]
    step: int
    conversations: list[list[dict[str, str]]]
    prompts: list[list[int]]
    reply_tokens: int


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
        strings: ids of each of `STRINGS`.
        full: (row, position) of each row of `log_probs`.
        best: (row, position, most likely next token) at the other positions.
        rendered: ids of the prompt of each conversation, by the file's own template.
        replies: prompt, greedy reply, and whether it ended by itself.
        log_probs: (N, V), of the token after each position of `full`.
    """

    strings: list[list[int]]
    full: list[tuple[int, int]]
    best: list[tuple[int, int, int]]
    rendered: list[list[int]]
    replies: list[tuple[list[int], list[int], bool]]
    log_probs: np.ndarray


@dataclass(frozen=True)
class Trouble:
    """Why there is no answer.

    Attributes:
        killed: the process was ended by a signal.
        unusable: the runtime itself does not work here, whatever the file is.
    """

    text: str
    killed: bool = False
    unusable: bool = False


def ask(question: Question) -> Answer | Trouble:
    """Start the process and wait for it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _QUESTION).write_text(json.dumps(asdict(question)))
        done = subprocess.run(
            [sys.executable, "-m", __name__, name], env=os.environ | _ONE_HEAP, stderr=subprocess.PIPE, text=True,
            errors="replace", check=False,
        )  # fmt: skip
        if done.returncode == 0:
            answer = json.loads((folder / _ANSWER).read_text())
            return Answer(**answer, log_probs=np.load(folder / _LOG_PROBS, allow_pickle=False))
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = f": {lines[-1]}" if lines else ""
        if done.returncode < 0:
            return Trouble(f"its process was ended by signal {-done.returncode}{said}", killed=True)
        last = lines[-1] if lines else f"exit code {done.returncode}"
        return Trouble(last, unusable=done.returncode == HostError.exit_code)


def _answer(question: Question) -> Answer:
    runtime = Runtime(question.path, context=question.context, threads=question.threads, exact=True)
    full: list[tuple[int, int]] = []
    best: list[tuple[int, int, int]] = []
    log_probs = []
    for number, (row, at) in enumerate((r, at) for r, ids in enumerate(question.rows) for at in range(len(ids))):
        before = question.rows[row][: at + 1]
        if number % question.step == 0:
            full.append((row, at))
            log_probs.append(runtime.log_probs(before, question.vocab_size))
        else:
            best.append((row, at, runtime.best(before)))
    replies = []
    for prompt in question.prompts:
        room = min(question.reply_tokens, question.context - len(prompt))
        if room > 0:
            replies.append((prompt, *runtime.complete(prompt, room)))
    return Answer(
        strings=[runtime.tokenize(text) for text in STRINGS],
        full=full,
        best=best,
        rendered=[runtime.render(messages) for messages in question.conversations],
        replies=replies,
        log_probs=np.stack(log_probs),
    )


def main(name: str) -> int:
    """Answer the question in a folder; the error's exit code, with a line on stderr, when llama.cpp cannot."""
    folder = Path(name)
    try:
        answer = _answer(Question(**json.loads((folder / _QUESTION).read_text())))
    except PicollmError as error:
        print(f"{error.message}: {error.cause}", file=sys.stderr)
        return error.exit_code
    values: dict[str, Any] = dict(vars(answer))
    np.save(folder / _LOG_PROBS, values.pop("log_probs"))
    (folder / _ANSWER).write_text(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
