"""What a stage shows while it runs: a live line on a terminal, plain lines elsewhere, the events under `--json`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from picollm.events import Event
from picollm.units import duration, size
from picollm_cli.console import PLAIN_LINE_EVERY_S, Output

if TYPE_CHECKING:
    from types import TracebackType

REDRAW_EVERY_S = 0.25
# Weight of the past in the shown loss; the first steps count fully (bias is corrected).
LOSS_SMOOTHING = 0.9
# Step events over which the pace behind "time left" is measured.
PACE_STEPS = 50


def _one_line(text: object, longest: int = 100) -> str:
    """What a model was asked or said, without control characters."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return line if len(line) <= longest else line[: longest - 1] + "…"


class Progress:
    """What is known about a running stage, from its events."""

    def __init__(self) -> None:
        self.step = 0
        self.total: int | None = None
        self.tokens_per_s: float | None = None
        self.mem_gib: float | None = None
        self._loss = 0.0
        self._weight = 0.0
        self._pace: list[float] = []

    def update(self, event: Event) -> None:
        """Take one event in; kinds that say nothing about progress are ignored."""
        if event["kind"] == "stage_start":
            self.step, self.total = event.get("resumed_from") or 0, event.get("total_steps")
        elif event["kind"] == "step":
            before, self.step = self.step, event.get("step", self.step)
            self.tokens_per_s = event.get("tokens_per_s") or self.tokens_per_s
            self.mem_gib = event.get("mem_gib") or self.mem_gib
            if (loss := event.get("loss")) is not None:
                self._loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
                self._weight = LOSS_SMOOTHING * self._weight + 1 - LOSS_SMOOTHING
            if dt_s := event.get("dt_s"):
                # An evaluation counts tokens or questions and tells of many at once.
                self._pace = [*self._pace, dt_s / max(1, self.step - before)][-PACE_STEPS:]

    @property
    def loss(self) -> float | None:
        """Smoothed training loss, in nats per token."""
        return self._loss / self._weight if self._weight else None

    @property
    def left_s(self) -> float | None:
        if not self.total or not self._pace:
            return None
        return (self.total - self.step) * sum(self._pace) / len(self._pace)

    def figures(self) -> str:
        """`loss 2.31  16,004 tok/s  625 MiB  12 s left`, as far as known."""
        parts = [
            None if self.loss is None else f"loss {self.loss:.3f}",
            None if not self.tokens_per_s else f"{self.tokens_per_s:,.0f} tok/s",
            None if not self.mem_gib else size(self.mem_gib * 2**30),
            None if not self.left_s else f"{duration(round(self.left_s))} left",
        ]
        return "  ".join(part for part in parts if part)

    def line(self, title: str) -> str:
        count = f"{self.step:,}/{self.total:,}" if self.total else (f"{self.step:,}" if self.step else "")
        return "  ".join(part for part in (f"{title} {count}".strip(), self.figures()) if part)


class StageView:
    """Shows one stage from `__enter__` to `__exit__`; `show` takes events, `tick` is called ten times a second."""

    def __init__(self, out: Output, title: str) -> None:
        self.out = out
        self.title = title
        self.progress = Progress()
        self._live: Any = None
        self._dirty = False
        self._said = ""
        self._started = self._drawn = time.monotonic()

    def __enter__(self) -> StageView:
        if self.out.stderr.is_terminal and not self.out.as_json:
            from rich.live import Live

            # Drawn by `tick` and not by rich's thread: a worker on two cores should feel nothing of it.
            self._live = Live(console=self.out.stderr, auto_refresh=False, transient=True)
            self._live.start()
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        if self.progress.step and kind is None and not self.out.as_json:
            self._say_line()

    def show(self, event: Event) -> None:
        """Take one event in; what is worth a line of its own is printed."""
        if self.out.as_json:
            sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
            sys.stdout.flush()
            return
        self.progress.update(event)
        self._dirty = True
        if event["kind"] == "stage_start" and (step := event.get("resumed_from")):
            self.say(f"{self.title}: continuing from step {step}")
        elif event["kind"] == "note":
            if event.get("level") == "warning":
                self.out.warn(str(event.get("text")))
            else:
                self.say(f"{self.title}: {event.get('text')}")
        elif event["kind"] == "sample":
            self.say(f"{self.title}: {_one_line(event.get('prompt'))} → {_one_line(event.get('text'))}")
        elif event["kind"] == "eval" and event.get("value") is not None:
            error = event.get("stderr")
            self.say(
                f"{self.title}: {event.get('name')} {event['value']:.4g}"
                + (f" ± {error:.2g}" if error is not None else "")
                + (f"  (n = {event['n']:,})" if event.get("n") else "")
            )

    def say(self, text: str) -> None:
        self.out.note(text)

    def tick(self) -> None:
        """Redraw, or print the plain line, when it is time to."""
        now = time.monotonic()
        if self._live:
            since = now - self._drawn
            if since >= REDRAW_EVERY_S and (self._dirty or since >= 1.0):
                self._draw()
        elif not self.out.as_json and now - self._drawn >= PLAIN_LINE_EVERY_S:
            self._drawn = now
            self._say_line()

    def _say_line(self) -> None:
        running = f"{self.title}: running for {duration(round(time.monotonic() - self._started))}"
        line = self.progress.line(self.title) if self.progress.step else running
        if line != self._said:
            self._said = line
            self.out.note(line)

    def _draw(self) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        self._drawn, self._dirty = time.monotonic(), False
        progress = self.progress
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=progress.total, completed=progress.step, width=30, pulse=not progress.total)
        count = (
            f"{progress.step:,}/{progress.total:,}" if progress.total else duration(round(self._drawn - self._started))
        )
        grid.add_row(self.title, bar, count, progress.figures())
        self._live.update(grid, refresh=True)
