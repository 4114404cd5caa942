"""`picollm chat --engine llamacpp`: a conversation with an exported GGUF file, answered by llama.cpp."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picollm.errors import ConfigError
from picollm_cli.console import Output

LEAST_REPLY_TOKENS = 16
# Keys and values of the whole context are allocated when a file is loaded: 2 GiB for a stock model of 7 B parameters
# at this length, and as many terabytes as a file cares to claim without a limit.
MOST_CONTEXT = 8192


class FileChat:
    """A conversation with a file; all that is known of the model is what stands in it.

    Args:
        system: system message, for chat models only.

    Attributes:
        context: tokens of the conversation and its reply: as many as the file names, at most `MOST_CONTEXT`.

    Raises:
        HostError: llama.cpp is not installed.
        IntegrityError: it cannot load the file.
        ConfigError: a base model was given a system message.
    """

    def __init__(self, path: Path, system: str | None) -> None:
        from picollm.export.llamacpp import Runtime, require
        from picollm.export.llamacpp_file import describe

        require()
        self.path = path
        self.about = describe(path)
        if system and not self.about.is_chat:
            raise ConfigError(
                "a base model takes no system message",
                cause=f"`{path.name}` has no chat template: it learned to continue text, not to follow turns",
                hint="export a later stage: `picollm export gguf --stage sft`",
            )
        self.context = min(self.about.context, MOST_CONTEXT)
        self._runtime = Runtime(path, context=self.context)
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    @property
    def note(self) -> str | None:
        """What a user should know of the context before it is full; None when it is the file's own."""
        if self.context == self.about.context:
            return None
        return f"the file names a context of {self.about.context:,} tokens; {self.context:,} are used here"

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self._turns = []

    def ask(self, text: str, *, temperature: float, seed: int, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Answer a message, or continue it where the file is a base model; oldest turns go when the context is full.

        Returns:
            {"text", "finish_reason", "tokens", "prompt_tokens", "turns_dropped"}

        Raises:
            ConfigError: the message does not fit the context.
        """
        if not self.about.is_chat:
            ids = [self.about.bos, *self._runtime.tokenize(text)]
            self._check(len(ids))
            reply = self._runtime.continue_text(
                ids, temperature=temperature, seed=seed, on_text=on_text, max_tokens=self.context - len(ids)
            )
            return {**reply, "turns_dropped": 0}
        turns, dropped = [*self._turns, {"role": "user", "content": text}], 0
        while (length := len(self._runtime.render([*self._system, *turns]))) + LEAST_REPLY_TOKENS > self.context:
            if len(turns) == 1:
                self._check(length)
            turns, dropped = turns[2:], dropped + 1
        said: list[str] = []

        def listen(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        try:
            reply = self._runtime.answer(
                [*self._system, *turns], temperature=temperature, seed=seed, on_text=listen,
                max_tokens=self.context - length,
            )  # fmt: skip
        finally:
            self._turns = [*turns, {"role": "assistant", "content": "".join(said)}]
        return {**reply, "turns_dropped": dropped}

    def _check(self, length: int) -> None:
        if length + LEAST_REPLY_TOKENS > self.context:
            raise ConfigError(
                "the message does not fit the context",
                cause=f"it has {length} tokens; the context has {self.context}, of which a reply needs "
                f"{LEAST_REPLY_TOKENS}",
                hint="shorten it",
            )


def choose_file(engine: str, run: str | None, stage: str | None) -> Path:
    """The file that `--engine` means: `llamacpp` is the newest export of the run, anything else a file's name.

    Raises:
        ConfigError: neither an engine nor a file.
        MissingArtifact: the run has no export.
    """
    from picollm.export.listing import newest_gguf
    from picollm.run_dir import expand, find_run
    from picollm_cli.stage_option import choose_stage

    if engine == "llamacpp":
        found = find_run(run)
        return newest_gguf(found, None if stage is None else choose_stage(found, stage))
    path = expand(engine)
    if not engine.endswith(".gguf") or not path.is_file():
        raise ConfigError(
            f"`{engine}` is no engine",
            cause="engines are `picollm`, `llamacpp`, and the path of a GGUF file that is there",
            hint="choose `--engine llamacpp` for the newest export of the run",
        )
    return path


def answer(
    out: Output, chat: FileChat, text: str, temperature: float, write: Callable[[str], None], end: Callable[[], None]
) -> None:
    """Decode one reply: streamed with `write`, or under `--json` as one object when it has ended."""
    seed = random.SystemRandom().randrange(2**31) if temperature else 0
    try:
        reply = chat.ask(text, temperature=temperature, seed=seed, on_text=write)
    finally:
        end()
    dropped = reply["turns_dropped"]
    if dropped:
        turns = "turn was" if dropped == 1 else f"{dropped} turns were"
        out.note(f"(the context is full: the oldest {turns} left out)", style="quiet")
    out.result(
        {
            "engine": "llamacpp",
            "file": str(chat.path),
            "run": chat.about.run,
            "stage": chat.about.stage,
            "step": chat.about.step,
            "reply": reply.pop("text").strip(),
            **reply,
            "temperature": temperature,
            "seed": seed,
        }
    )


def header(chat: FileChat, temperature: float) -> str:
    """Who answers, in one line."""
    how = f"temperature {temperature:g}" if temperature else "greedy"
    return f"{chat.path.name}, answered by llama.cpp, context of {chat.context:,} tokens, {how}"


NO_CALCULATOR = "llama.cpp runs no calculator: the model guesses what ours would work out, and shows its working"
