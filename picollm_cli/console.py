"""Where text goes: data to stdout, everything else to stderr; the only user of rich's Console.

Colour obeys NO_COLOR, FORCE_COLOR and the terminal (rich does). Under `--json` stdout carries JSON only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase, TextIOWrapper
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.theme import Theme

from picollm.errors import ConfigError, PicollmError

THEME = Theme(
    {
        "good": "green",
        "warn": "yellow",
        "bad": "bold red",
        "hint": "cyan",
        "quiet": "dim",
        "name": "bold",
    }
)
PLAIN_LINE_EVERY_S = 5.0
PIPE_WIDTH = 1000


def ready_streams() -> None:
    """Make stdout and stderr able to take any text: what their encoding lacks is escaped, and a closed one swallows.

    Names of files may hold bytes that are no text, and `LC_ALL=C` may mean ASCII. A closed stdin is an empty one.
    """
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, TextIOWrapper):
            # Under PYTHONUNBUFFERED a text of which a full disk took a part would pass for written.
            if isinstance(stream.buffer, RawIOBase):
                stream = open(stream.fileno(), "w", buffering=1, encoding=stream.encoding, closefd=False)
                setattr(sys, name, stream)
            stream.reconfigure(errors="backslashreplace")


def write_json_line(value: dict[str, Any]) -> None:
    """One JSON object in a line on stdout, with escapes for what its encoding lacks."""
    text = json.dumps(value, ensure_ascii=(sys.stdout.encoding or "utf-8").lower() not in ("utf-8", "utf8"))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Output:
    """One command's voice.

    Args:
        as_json: human text is silenced on stdout; `result` prints one JSON object there.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.stdout = Console(theme=THEME, soft_wrap=True, highlight=False)
        if not (self.stdout.is_terminal or "COLUMNS" in os.environ):
            # A file or a pipe has no edge: one row of a table stays one line.
            self.stdout.width = PIPE_WIDTH
        self.stderr = Console(theme=THEME, soft_wrap=True, highlight=False, stderr=True)

    @property
    def redraws(self) -> bool:
        """Whether a line on stderr can be drawn again: on a terminal that has more than `TERM=dumb`."""
        return self.stderr.is_terminal and not self.stderr.is_dumb_terminal

    def print(self, renderable: Any = "", *, style: str | None = None) -> None:
        """Data for a human, on stdout. Strings are printed as they are, without markup."""
        if not self.as_json:
            self.stdout.print(renderable, style=style, markup=False)

    def table(self, table: Any) -> None:
        """Data in columns, on stdout, as wide as it is: a narrow terminal wraps its lines, and no cell is lost.

        Lines end with their text: blanks up to the longest line would wrap into empty ones.
        """
        if self.as_json:
            return
        from rich.segment import Segment, Segments

        rows: list[Segment] = []
        for line in self.stdout.render_lines(table, self.stdout.options.update(width=PIPE_WIDTH), pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            rows += [*line, Segment.line()]
        self.stdout.print(Segments(rows), end="")

    def note(self, text: Any, *, style: str | None = None) -> None:
        """What is going on, on stderr."""
        self.stderr.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        # In one piece: a live line would be drawn again after the first word.
        self.stderr.print(Text.assemble(("warning:", "warn"), f" {text}"))

    def hint(self, text: str) -> None:
        """The next command, on stderr after a blank line."""
        self.stderr.print()
        self.stderr.print("[hint]hint:[/hint] ", end="")
        self.stderr.print(text, markup=False)

    def result(self, value: dict[str, Any]) -> None:
        """The result object: one line of JSON, the last on stdout, under `--json` only."""
        if self.as_json:
            write_json_line(value)

    def error(self, error: PicollmError) -> None:
        """An error in its three parts, on stderr; under `--json` also as the result object."""
        self.stderr.print("[bad]error:[/bad] ", end="")
        self.stderr.print(error.message, markup=False)
        if error.cause:
            self.stderr.print(f"  cause: {error.cause}", markup=False)
        if error.hint:
            self.hint(error.hint)
        with suppress(OSError):  # stdout may be what the error is about
            self.result({"error": error.to_dict()})

    def confirm(self, question: str, *, yes: bool) -> bool:
        """Ask on stderr; `--yes` answers; without a terminal nobody can.

        Raises:
            ConfigError: there is no terminal and `--yes` was not given.
        """
        if yes:
            return True
        if not sys.stdin.isatty():
            raise ConfigError(
                f"{question} needs an answer", cause="stdin is not a terminal", hint="repeat the command with `--yes`"
            )
        self.stderr.print(f"{question} [y/N] ", end="", markup=False)
        return input().strip().lower() in ("y", "yes")

    @contextmanager
    def progress(self, title: str, *, unit: str) -> Iterator[Callable[[float, float], None]]:
        """A progress bar on a terminal, else one plain line every few seconds; all on stderr.

        Yields:
            `update(done, total)`: absolute values, in `unit`.
        """
        if self.redraws:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            with Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.stderr, transient=True,
            ) as bar:  # fmt: skip
                task = bar.add_task(title, total=None)

                def update(done: float, total: float) -> None:
                    bar.update(task, completed=done, total=total)

                yield update
            return
        started = last = time.monotonic()

        def plain(done: float, total: float) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= PLAIN_LINE_EVERY_S:
                last = now
                self.note(f"{title}: {done:,.0f} / {total:,.0f} {unit} after {now - started:.0f} s")

        yield plain
