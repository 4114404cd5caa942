"""What the model says: a few fixed prompts, decoded greedily, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from picollm.data.conversations import Message, Part
from picollm.generate.engine import Engine
from picollm.generate.sampler import Sampling
from picollm.generate.session import parts_to_json
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.tokenizer import Tokenizer

OPENINGS = (
    "Once upon a time",
    "The capital of France is",
    "There are seven days in a week:",
    "To write a good program, you should",
)
"""Beginnings that a base model continues."""

QUESTIONS = (
    "Who are you?",
    "What is 7 plus 5?",
    "How many r are in strawberry?",
    "Tell me a story about a fox.",
)
"""What a chat model is asked."""


def prompts(tokenizer: Tokenizer, chat: bool, longest: int) -> list[tuple[str, list[int]]]:
    """The fixed prompts as text and token ids; those of more than `longest` tokens are left out."""
    if chat:
        messages = ((text, Message("user", (Part("text", text),))) for text in QUESTIONS)
        found = [(text, render_prompt(tokenizer, (message,))) for text, message in messages]
    else:
        found = [(text, [tokenizer.bos, *tokenizer.encode(text)]) for text in OPENINGS]
    return [(text, ids) for text, ids in found if len(ids) <= longest]


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    chat: bool,
    max_new_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Decode the fixed prompts greedily.

    Args:
        chat: ask questions instead of continuing text.
        on_progress: called with the number of replies that have ended after each token; may raise to stop.

    Returns:
        one `{"prompt", "text", "finish_reason", "parts"}` per prompt that fits the context.
    """
    texts = prompts(tokenizer, chat, engine.capacity)
    ended = 0

    def count(_index: int, output: Any) -> None:
        nonlocal ended
        ended += output.reply is not None
        if on_progress is not None:
            on_progress(ended)

    replies = engine.generate([ids for _, ids in texts], Sampling(max_new_tokens=max_new_tokens), count)
    return [
        {
            "prompt": text,
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "parts": parts_to_json(reply.parts),
        }
        for (text, _), reply in zip(texts, replies, strict=True)
    ]
