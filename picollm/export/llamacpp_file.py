"""What a GGUF file says of itself, as a conversation with it needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.errors import IntegrityError
from picollm.export.gguf_file import open_file


@dataclass(frozen=True)
class About:
    """A file's own description.

    Attributes:
        context: tokens it was trained with, as it says; a foreign file may say anything above zero.
        bos: id of the first token of every text.
        is_chat: it has a chat template.
        run, stage, step: where it comes from; None where picollm has not written it.
    """

    context: int
    bos: int
    is_chat: bool
    run: str | None
    stage: str | None
    step: int | None


def describe(path: Path) -> About:
    """Read a file's keys.

    Raises:
        IntegrityError: it is no GGUF file, or lacks a key that every model has.
    """
    with open_file(path) as reader:
        fields = reader.fields

        def value(name: str) -> Any:
            return fields[name].contents() if name in fields else None

        host, stage, name = (value(key) for key in ("general.architecture", "picollm.stage", "general.name"))
        context, bos = value(f"{host}.context_length"), value("tokenizer.ggml.bos_token_id")
        step, is_chat = value("picollm.step"), "tokenizer.chat_template" in fields
    if not isinstance(context, int) or not isinstance(bos, int) or context < 1:
        raise IntegrityError(
            f"`{path}` is not a language model",
            cause="it lacks a context length or a first token",
            hint="export it again",
        )
    run = name.removesuffix(f"-{stage}") if isinstance(stage, str) and isinstance(name, str) else None
    return About(context, bos, is_chat, run, stage, step)
