"""A conversation with a trained stage: loading it, keeping the history, fitting it into the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from picollm.data.conversations import Message, Part
from picollm.errors import ConfigError, IntegrityError
from picollm.generate.engine import Engine, Reply, StepOutput
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train.checkpoint import load_model

# Tokens a reply must have: a short call of the calculator and the sentence after it.
LEAST_REPLY_TOKENS = 16


@dataclass(frozen=True)
class TrainedModel:
    """A stage's model beside the tokenizer it was trained with."""

    model: GPT
    tokenizer: Tokenizer
    stage: StageDir
    step: int
    sha256: str

    @property
    def is_chat(self) -> bool:
        """False for a base model, which continues text and knows no turns."""
        return self.stage.name != "pretrain"

    @property
    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def open_stage(stage: StageDir, *, device: str = "cpu") -> TrainedModel:
    """Load a stage's newest checkpoint, its weights in float32, and its run's tokenizer.

    Raises:
        MissingArtifact: there is no checkpoint or no tokenizer.
        IntegrityError: one of them is damaged, or they do not belong together.
    """
    loaded = load_model(stage, dtype="float32", device=device)
    tokenizer = Tokenizer.load(stage.run.tokenizer)
    if loaded.tokenizer_sha256 != tokenizer.sha256:
        raise IntegrityError(
            f"the tokenizer of run `{stage.run.name}` is not the one its stage `{stage.name}` was trained with",
            cause=f"it is {tokenizer.sha256[:12]}…, the checkpoint names {loaded.tokenizer_sha256[:12]}…",
            hint="restore `tokenizer/`, or train again in a new run",
        )
    if loaded.arch.vocab_size != tokenizer.vocab_size:
        raise IntegrityError(
            f"the model of stage `{stage.name}` of run `{stage.run.name}` has another vocabulary than its tokenizer",
            cause=f"`meta.json` says {loaded.arch.vocab_size:,} tokens, the tokenizer has {tokenizer.vocab_size:,}",
            hint="restore the checkpoint from a copy, or train again in a new run",
        )
    return TrainedModel(loaded.model, tokenizer, stage, loaded.step, loaded.sha256)


def parts_to_json(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Parts as in a file of conversations: `{"type": "text" | "python" | "python_output", "text"}`."""
    content: Any = Message("assistant", tuple(parts)).to_json()["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def fit(
    tokenizer: Tokenizer, messages: Sequence[Message], capacity: int, room: int = LEAST_REPLY_TOKENS
) -> tuple[list[int], int]:
    """Token ids of the newest turns that leave room for a reply; a system message always stays.

    Args:
        messages: optional system message, then turns; the last message is the user's.
        capacity: context in tokens.
        room: tokens wanted for the reply. The newest message alone needs only LEAST_REPLY_TOKENS.

    Returns:
        the prompt and the number of turns (a user message and its answer) left out.

    Raises:
        ConfigError: the newest message, with the system message, does not fit.
    """
    system = list(messages[:1]) if messages[0].role == "system" else []
    turns = list(messages[len(system) :])
    dropped = 0
    while True:
        ids = render_prompt(tokenizer, tuple(system + turns))
        newest_only = len(turns) == 1
        if len(ids) + (LEAST_REPLY_TOKENS if newest_only else room) <= capacity:
            return ids, dropped
        if newest_only:
            raise _too_long(len(ids), capacity)
        turns = turns[2:]
        dropped += 1


def _too_long(length: int, capacity: int) -> ConfigError:
    return ConfigError(
        "the message does not fit the model's context",
        cause=f"it has {length} tokens; the context has {capacity}, of which a reply needs {LEAST_REPLY_TOKENS}",
        hint="shorten it",
    )


@dataclass
class Session:
    """One conversation on an engine of one slot (or a slot of a larger one).

    Attributes:
        history: the turns so far, system message first.
        dropped: turns the last prompt had no room for.
        prompt_tokens: length of the last prompt.
        last: the last reply.
    """

    engine: Engine
    tokenizer: Tokenizer
    is_chat: bool
    system: str | None = None
    history: list[Message] = field(default_factory=list)
    dropped: int = 0
    prompt_tokens: int = 0
    last: Reply | None = None

    def __post_init__(self) -> None:
        if self.system and not self.is_chat:
            raise ConfigError(
                "a base model takes no system message",
                cause="stage `pretrain` learned to continue text, not to follow turns",
                hint="use a later stage: `picollm chat --stage sft`",
            )
        self.reset()

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.history = [Message("system", (Part("text", self.system),))] if self.system else []

    def ask(self, text: str, sampling: Sampling) -> Iterator[StepOutput]:
        """Send a message and yield the reply as it is decoded; `last` holds it afterwards.

        Closing the iterator, or an exception in it (Ctrl-C), stops the reply and keeps what was said so far. For a
        base model `text` is continued and there is no history. The reply ends at the context's end at the latest.

        Raises:
            ConfigError: the message does not fit the context.
        """
        capacity = self.engine.capacity
        if self.is_chat:
            asked = [*self.history, Message("user", (Part("text", text),))]
            ids, self.dropped = fit(self.tokenizer, asked, capacity, max(LEAST_REPLY_TOKENS, capacity // 4))
        else:
            asked, ids = [], [self.tokenizer.bos, *self.tokenizer.encode(text)]
            if len(ids) + LEAST_REPLY_TOKENS > capacity:
                raise _too_long(len(ids), capacity)
        self.prompt_tokens = len(ids)
        request = self.engine.submit(ids, replace(sampling, require_text=True))
        reply: Reply | None = None
        try:
            while reply is None:
                for output in self.engine.step():
                    reply = output.reply
                    yield output
        finally:
            self.last = reply or self.engine.cancel(request)
            if self.is_chat and self.last is not None:
                self.history = [*asked, Message("assistant", self.last.parts)]
