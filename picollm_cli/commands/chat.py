"""`picollm chat`: talk to a trained stage in the terminal, or ask one question from a script."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.processes import SPIN_COUNT
from picollm_cli.stage_option import StageOption, choose_stage
from picollm_cli.text_input import argument_text, stdin_text, utf8_text

if TYPE_CHECKING:
    from picollm.generate.session import Session, TrainedModel

HELP = """\
/help    this list
/reset   forget the conversation
/quit    leave (also Ctrl-D)
Ctrl-C   stop the reply"""


def chat(
    run: options.Run = None,
    stage: StageOption = None,
    prompt: Annotated[
        Optional[str],
        typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, print the reply, leave; `-` reads stdin."),
    ] = None,
    system: Annotated[Optional[str], typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 is greedy; higher is more varied.")
    ] = 0.0,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="ENGINE",
            help="picollm; llamacpp answers with the newest exported GGUF, or name a file.",
        ),
    ] = "picollm",
    json: options.Json = False,
) -> None:
    """Chat with a trained model.

    Without `-p` an interactive chat begins: replies stream, the conversation
    is remembered as far as the context goes, `/help` lists its commands.
    A base model (stage `pretrain`) continues your text instead.

    \b
    Examples:
      picollm chat
      picollm chat -p "What is 7 plus 5?"
      picollm chat --run demo --stage pretrain -p "Once upon a time"
      picollm chat --temperature 0.8 --system "Answer briefly."
      picollm chat --engine llamacpp -p "Who are you?"
      echo "Who are you?" | picollm chat -p - --json
    """
    from picollm.errors import ConfigError
    from picollm.run_dir import find_run

    out = Output(as_json=json)
    found = find_run(run) if engine == "picollm" else None
    if prompt is not None:
        prompt = stdin_text().strip("\n") if prompt == "-" else argument_text(prompt)
    if system is not None:
        system = argument_text(system)
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty", hint='give a text: `picollm chat -p "Who are you?"`')
    if found is None:
        _with_file(out, engine, run, stage, prompt, system, temperature)
        return
    chosen = choose_stage(found, stage)
    # Torch comes with these; nothing above needs it, so that mistakes are told at once.
    os.environ.update(SPIN_COUNT | os.environ)  # OpenMP reads it when torch is loaded, which is here
    from picollm.generate.engine import Engine
    from picollm.generate.session import Session, open_stage

    trained = open_stage(chosen)
    engine = Engine(trained.model, trained.tokenizer, num_slots=1)
    session = Session(engine, trained.tokenizer, trained.is_chat, system)
    if prompt is not None:
        _answer(out, session, trained, prompt, temperature)
    else:
        _interactive(out, session, trained, temperature)


def _answer(out: Output, session: Session, trained: TrainedModel, text: str, temperature: float) -> None:
    """Decode one reply: streamed to stdout, or under `--json` as one object when it has ended."""
    import random

    from picollm.generate.sampler import Sampling
    from picollm.generate.session import parts_to_json

    seed = random.SystemRandom().randrange(2**31) if temperature else 0
    sampling = Sampling(temperature=temperature, max_new_tokens=session.engine.capacity, seed=seed)
    outputs = session.ask(text, sampling)
    show = _Stream(silent=out.as_json)
    try:
        for output in outputs:
            show.write(output.text)
    finally:
        outputs.close()
        show.end()
    reply = session.last
    assert reply is not None
    if session.dropped:
        turns = "turn was" if session.dropped == 1 else f"{session.dropped} turns were"
        out.note(f"(the context is full: the oldest {turns} left out)", style="quiet")
    out.result(
        {
            "run": trained.stage.run.name,
            "stage": trained.stage.name,
            "step": trained.step,
            "reply": reply.text.strip(),
            "parts": parts_to_json(reply.parts),
            "finish_reason": reply.finish_reason,
            "tokens": len(reply.ids),
            "prompt_tokens": session.prompt_tokens,
            "turns_dropped": session.dropped,
            "temperature": temperature,
            "seed": seed,
        }
    )


def _interactive(out: Output, session: Session, trained: TrainedModel, temperature: float) -> None:
    """Read a line, stream the reply, again; until /quit or the end of input."""
    how = f"temperature {temperature:g}" if temperature else "greedy"
    out.note(
        f"run {trained.stage.run.name}, stage {trained.stage.name}, step {trained.step:,}, "
        f"{trained.num_params:,} parameters, context of {session.engine.capacity:,} tokens, {how}"
    )
    if not trained.is_chat:
        out.note("this is a base model: it continues your text and remembers nothing")
    _converse(out, lambda text: _answer(out, session, trained, text, temperature), session.reset)


def _with_file(
    out: Output, engine: str, run: str | None, stage: str | None, prompt: str | None, system: str | None,
    temperature: float,
) -> None:  # fmt: skip
    """The same with an exported file, which llama.cpp answers with."""
    from picollm_cli.file_chat import NO_CALCULATOR, FileChat, answer, choose_file, header

    chat = FileChat(choose_file(engine, run, stage), system)

    def ask(text: str) -> None:
        show = _Stream(silent=out.as_json)
        answer(out, chat, text, temperature, show.write, show.end)

    if prompt is None:
        out.note(header(chat, temperature))
    if chat.note is not None:
        out.note(chat.note)
    if chat.about.is_chat:
        out.note(NO_CALCULATOR, style="quiet")
    else:
        out.note("this is a base model: it continues your text and remembers nothing")
    if prompt is not None:
        ask(prompt)
    else:
        _converse(out, ask, chat.reset)


def _converse(out: Output, answer: Callable[[str], None], reset: Callable[[], None]) -> None:
    """Lines and commands until /quit or the end of input."""
    from picollm.errors import ConfigError

    out.note("/help lists the commands, Ctrl-D quits", style="quiet")
    for line in _lines(out):
        text = line.strip()
        if text == "/quit":
            return
        if text == "/help":
            out.note(HELP)
        elif text == "/reset":
            reset()
            out.note("the conversation is forgotten", style="quiet")
        elif text.startswith("/") and " " not in text:
            out.note(f"`{text}` is not a command; /help lists them")
        elif text:
            try:
                answer(text)
            except KeyboardInterrupt:
                out.note("stopped", style="quiet")
            except ConfigError as error:
                out.note(f"{error.message}: {error.cause}")


def _lines(out: Output) -> Iterator[str]:
    """Input lines: with editing and history on a terminal, as they are from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from map(utf8_text, sys.stdin.buffer)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    from picollm.run_dir import base_dir

    path = base_dir() / "chat_history"
    try:
        path.touch(mode=0o600)
        history: FileHistory | InMemoryHistory = FileHistory(path)
    except OSError:
        # Talking to a model in a directory that cannot be written is fine; only the history is lost.
        history = InMemoryHistory()
    reader: PromptSession[str] = PromptSession(history=history)
    while True:
        try:
            yield reader.prompt("> ")
        except KeyboardInterrupt:
            out.note("Ctrl-D or /quit leaves", style="quiet")
        except EOFError:
            return


class _Stream:
    """Writes a reply to stdout as it comes, without white space around it.

    On a terminal control characters are dropped: a model may say any byte, and none of them shall drive the terminal.
    """

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._to_terminal = sys.stdout.isatty()
        self._started = False
        self._held = ""

    def write(self, piece: str) -> None:
        text = self._held + piece
        visible = text.rstrip()
        self._held = text[len(visible) :]
        if not self._started:
            visible = visible.lstrip()
        if not visible or self._silent:
            return
        self._started = True
        if self._to_terminal:
            visible = "".join(c for c in visible if c in "\n\t" or c.isprintable())
        sys.stdout.write(visible)
        sys.stdout.flush()

    def end(self) -> None:
        if self._started:
            sys.stdout.write("\n")
            sys.stdout.flush()
