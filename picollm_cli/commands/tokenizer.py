"""Train a run's tokenizer, measure it, and look at how it cuts text."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.text_input import argument_text, stdin_text

if TYPE_CHECKING:
    from picollm.tokenizer.tokenizer import Tokenizer

HELP = """Train, measure and look at the tokenizer.

\b
Examples:
  picollm tokenizer train --preset demo
  picollm tokenizer eval --run demo
  picollm tokenizer show "Who are you?"
"""
app = typer.Typer(no_args_is_help=True, help=HELP)

EVAL_CHARS = 5_000_000  # of the validation split: enough to rank tokenizers, seconds to read
COLOURS = ("black on bright_cyan", "black on bright_yellow")


@app.command()
def train(
    run: options.Run = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Set = None,
    json: options.Json = False,
) -> None:
    """Train the run's tokenizer on its dataset.

    Makes the run when there is none of that name. A tokenizer that is there
    and intact is kept.

    \b
    Examples:
      picollm tokenizer train --preset demo
      picollm tokenizer train --preset cpu-small --set data.dataset=peps
      picollm tokenizer train --run peps --set tokenizer.vocab_size=4096
    """
    from picollm.tokenizer.stage import train_stage
    from picollm_cli.environment import record_command
    from picollm_cli.prepare import open_run
    from picollm_cli.prepare_stage import warn_of_small_vocabulary

    out = Output(json)
    with open_run(out, run=run, preset=preset, config=config, sets=sets) as prepared:
        target = prepared.run
        skipped = True  # training always reports progress; a repair gives the same record, yet it was trained
        with out.progress("tokenizer", unit="characters") as update:

            def on_progress(done: int, total: int) -> None:
                nonlocal skipped
                if skipped:
                    record_command(target, "tokenizer")
                skipped = False
                update(done, total)

            record = train_stage(target, prepared.config, on_progress=on_progress)
    result = record["result"]
    warn_of_small_vocabulary(out, prepared, result["vocab_size"])
    out.print(
        f"{'Kept' if skipped else 'Trained'} tokenizer of run `{target.name}`: {result['vocab_size']:,} tokens "
        f"from {result['chars']:,} characters"
    )
    if not skipped:
        out.hint(f"see it work with `picollm tokenizer show --run {target.name} 'Hello world'`")
    out.result({"run": target.name, "path": str(target.tokenizer), "skipped": skipped, **result})


@app.command("eval")
def evaluate(
    run: options.Run = None,
    beside: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another `tokenizer.json` to measure on the same texts.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure bytes per token by kind of text, round trips and speed.

    Reads the validation split of the run's dataset, and small built-in samples
    of prose, code, numbers and other scripts. GPT-2's and GPT-4's tokenizers
    are measured beside it where a cache of this machine has them; none is
    fetched.

    \b
    Examples:
      picollm tokenizer eval
      picollm tokenizer eval --run peps --json
      picollm tokenizer eval --beside ~/models/other/tokenizer.json
    """
    from picollm.config.resolve import resolve_existing
    from picollm.data.toy_datasets import ensure
    from picollm.errors import IntegrityError
    from picollm.run_dir import find_run
    from picollm.tokenizer.quality import evaluate as measure
    from picollm.tokenizer.references import find_references, open_reference
    from picollm.tokenizer.tokenizer import Tokenizer
    from picollm.tokenizer.train import capped

    out = Output(json)
    target = find_run(run)
    tokenizer = Tokenizer.load(target.tokenizer)
    names = dict(resolve_existing(target.read_config()).config.data.sources)
    held_back = {}
    for name in names:
        dataset = ensure(name, base=target.base, keep=target.dataset_hashes())
        kind = "validation" if len(names) == 1 else f"validation {name}"
        held_back[kind] = capped(dataset.documents("validation"), max_chars=EVAL_CHARS, doc_chars=EVAL_CHARS)
    others, absent = find_references()
    if beside is not None:
        others.append(open_reference(beside))
    quality = measure(tokenizer, held_back, others)

    table = Table(box=None, pad_edge=False)
    table.add_column("text")
    for heading in ("documents", "bytes", "tokens", "bytes per token", *quality.beside):
        table.add_column(heading, justify="right")
    for name, kind in quality.kinds.items():
        numbers = (f"{kind.documents:,}", f"{kind.bytes:,}", f"{kind.tokens:,}", f"{kind.bytes_per_token:.2f}")
        table.add_row(name, *numbers, *(f"{counted[name]:.2f}" for counted in quality.beside.values()))
    out.table(table)
    failed = len(quality.round_trip_failed)
    out.print()
    for other in others:
        out.print(f"beside        {other.name}: {other.vocab_size:,} tokens, `{other.path}`")
    for name, reason in absent.items():
        out.note(f"{name} is not measured beside it: {reason}", style="quiet")
    out.print(f"vocabulary    {quality.vocab_size:,} tokens, {quality.unused_share:.1%} not needed by these texts")
    out.print(f"round trip    {quality.round_trip_texts - failed:,} of {quality.round_trip_texts:,} texts exact")
    out.print(f"unknown bytes {quality.unknown_bytes}")
    if quality.chars_per_cpu_s:
        out.print(f"speed         {quality.chars_per_cpu_s / 1e6:.1f} M characters per CPU-second")
    if failed or quality.unknown_bytes:
        raise IntegrityError(
            f"the tokenizer of run `{target.name}` does not keep text as it is",
            cause=f"{failed} texts do not round-trip, {quality.unknown_bytes} bytes are unknown; "
            f"the first text is {quality.round_trip_failed[:1]!r}",
            hint=f"make it again with `picollm speedrun --run {target.name} --force tokenizer`",
        )
    out.result({"run": target.name, **quality.to_dict()})


@app.command()
def show(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text to cut into tokens; `-` reads stdin.")],
    run: options.Run = None,
    json: options.Json = False,
) -> None:
    """Show how a text is cut into tokens.

    Tokens take turns in colour; without colour a bar stands between them.
    Bytes that are no character of their own are shown as <E2>.

    \b
    Examples:
      picollm tokenizer show "Who are you?"
      picollm tokenizer show --json "7 plus 5 is 12."
      cat README.md | picollm tokenizer show -
    """
    from picollm.run_dir import find_run
    from picollm.tokenizer.tokenizer import Tokenizer

    out = Output(json)
    text = stdin_text() if text == "-" else argument_text(text)
    tokenizer = Tokenizer.load(find_run(run).tokenizer)
    ids = tokenizer.encode(text)
    out.print(coloured(tokenizer, ids, colour=out.stdout.color_system is not None and not out.stdout.no_color))
    num_bytes = sum(tokenizer.token_bytes[token] for token in ids)
    if not json:
        ratio = f", {num_bytes / len(ids):.2f} bytes per token" if ids else ""
        out.note(f"{len(ids):,} tokens, {num_bytes:,} bytes{ratio}", style="quiet")
    out.result({"ids": ids, "tokens": [visible(tokenizer.id_to_bytes(token)) for token in ids], "bytes": num_bytes})


def coloured(tokenizer: Tokenizer, ids: list[int], *, colour: bool) -> Text:
    """The tokens one after the other, in alternating colours or with bars between them."""
    shown = Text()
    for i, token in enumerate(ids):
        if i and not colour:
            shown.append("│")
        shown.append(visible(tokenizer.id_to_bytes(token)), style=COLOURS[i % 2] if colour else None)
    return shown


def visible(piece: bytes) -> str:
    """A token as text; bytes that are no whole character, and control characters but tab and newline, as <1B>."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)
    return "".join(
        f"<{ord(character):02X}>" if unicodedata.category(character) == "Cc" and character not in "\t\n" else character
        for character in text
    )
