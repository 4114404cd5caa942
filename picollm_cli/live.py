"""What a stage shows while it runs: a live line on a terminal, plain lines elsewhere, the events under `--json`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from picollm.events import Event
from picollm.units import duration, size
from picollm_cli.console import PLAIN_LINE_EVERY_S, Output, write_json_line

if TYPE_CHECKING:
    from types import TracebackType

REDRAW_EVERY_S = 0.25
# Weight of the past in the shown loss; the first steps count fully (bias is corrected).
LOSS_SMOOTHING = 0.9
# Step events over which the pace behind "time left" is measured.
PACE_STEPS = 50
BAR_WIDTH = 20


def _one_line(text: object, longest: int = 100) -> str:
    """What a model was asked or said, without control characters."""
    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _kind(phase: str) -> str:
    """A phase without how far it is: `evaluating` of `evaluating, 40% done…`."""
    return phase.partition(",")[0].rstrip("…")


class Progress:
    """What is known about a running stage, from its events.

    Args:
        phase: what it does before its first event.
        usd_per_hour: price of what it runs on, where that is known.
    """

    def __init__(self, phase: str = "", usd_per_hour: float | None = None) -> None:
        self.phase = phase
        self.usd_per_hour = usd_per_hour
        self.starts = 0
        self.step = 0
        self.total: int | None = None
        self.tokens_per_s: float | None = None
        self.mfu: float | None = None
        self.mem_gib: float | None = None
        self.grad_norm: float | None = None
        self._loss = 0.0
        self._weight = 0.0
        self._pace: list[float] = []
        self._started = self._phase_since = time.monotonic()

    def update(self, event: Event) -> None:
        """Take one event in; kinds that say nothing about progress are ignored."""
        if event["kind"] == "stage_start":
            self.starts += 1
            self.step, self.total = event.get("resumed_from") or 0, event.get("total_steps")
            self._loss = self._weight = 0.0
            self._pace = []
            self._enter("")
        elif event["kind"] == "phase":
            # After the first phases the worker still prepares: an empty line would say nothing.
            self._enter(str(event.get("text") or ("" if self.starts else "starting")))
        elif event["kind"] == "step":
            self._enter("")
            before, self.step = self.step, event.get("step", self.step)
            for figure in ("tokens_per_s", "mfu", "mem_gib", "grad_norm"):
                setattr(self, figure, event.get(figure) or getattr(self, figure))
            if (loss := event.get("loss")) is not None:
                self._loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
                self._weight = LOSS_SMOOTHING * self._weight + 1 - LOSS_SMOOTHING
            if dt_s := event.get("dt_s"):
                # An evaluation counts tokens or questions and tells of many at once.
                self._pace = [*self._pace, dt_s / max(1, self.step - before)][-PACE_STEPS:]

    def _enter(self, phase: str) -> None:
        if _kind(phase) != _kind(self.phase):
            self._phase_since = time.monotonic()
        self.phase = phase

    @property
    def loss(self) -> float | None:
        """Smoothed training loss, in nats per token."""
        return self._loss / self._weight if self._weight else None

    @property
    def left_s(self) -> float | None:
        if not self.total or not self._pace:
            return None
        return (self.total - self.step) * sum(self._pace) / len(self._pace)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def cost_usd(self) -> float | None:
        """Dollars since the command started the stage, at typical prices; None where none is known."""
        return None if self.usd_per_hour is None else self.usd_per_hour * self.elapsed_s / 3600

    def count(self) -> str:
        """`120/1,000`, `120` or nothing."""
        return f"{self.step:,}/{self.total:,}" if self.total else (f"{self.step:,}" if self.step else "")

    def doing(self) -> str:
        """A phase that is not a step, and for how long: `compiling… 12 s`."""
        return f"{self.phase} {duration(round(time.monotonic() - self._phase_since))}" if self.phase else ""

    def speed(self) -> list[str]:
        """`loss 2.310`, `16,004 tok/s`, `MFU 52.1 %`, `625 MiB`, as far as known."""
        parts = [
            None if self.loss is None else f"loss {self.loss:.3f}",
            None if not self.tokens_per_s else f"{self.tokens_per_s:,.0f} tok/s",
            None if not self.mfu else f"MFU {100 * self.mfu:.1f} %",
            None if not self.mem_gib else size(self.mem_gib * 2**30),
        ]
        return [part for part in parts if part]

    def ahead(self) -> list[str]:
        """`12 s left`, `about 1.20 USD so far`, as far as known."""
        parts = [
            None if not self.left_s else f"{duration(round(self.left_s))} left",
            None if self.cost_usd is None else f"about {self.cost_usd:,.2f} USD so far",
        ]
        return [part for part in parts if part]

    def line(self, title: str) -> str:
        """Everything in one line, for a log."""
        parts = [f"{title} {self.count()}".strip(), self.doing(), *self.speed(), *self.ahead()]
        return "  ".join(part for part in parts if part)


class StageView:
    """Shows one stage from `__enter__` to `__exit__`; `show` takes events, `tick` is called ten times a second.

    Args:
        waiting: what happens before the worker's first word.
        usd_per_hour: price of what the stage runs on, where that is known.
    """

    def __init__(
        self, out: Output, title: str, *, waiting: str = "starting", usd_per_hour: float | None = None
    ) -> None:
        self.out = out
        self.title = title
        self.progress = Progress(waiting, usd_per_hour)
        self._live: Any = None
        self._dirty = False
        self._said = ""
        self._drawn = time.monotonic()

    def __enter__(self) -> StageView:
        if self.out.redraws and not self.out.as_json:
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
            write_json_line(event)
            return
        self.progress.update(event)
        self._dirty = True
        if event["kind"] == "stage_start":
            if self.progress.starts > 1:
                step = event.get("resumed_from") or 0
                self.out.warn(f"{self.title}: a process died and all were started again, from step {step}")
            elif step := event.get("resumed_from"):
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
        line = self.progress.line(self.title)
        if line != self._said:
            self._said = line
            self.out.note(line)

    def _draw(self) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        self._drawn, self._dirty = time.monotonic(), False
        progress = self.progress
        first = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=progress.total, completed=progress.step, width=BAR_WIDTH, pulse=not progress.total)
        rest = [progress.doing(), *progress.ahead()] if progress.step else [progress.doing()]
        first.add_row(self.title, bar, progress.count(), Text("  ".join(part for part in rest if part)))
        grad_norm = [f"grad norm {progress.grad_norm:.3g}"] if progress.grad_norm else []
        second = Text("  ".join([*progress.speed(), *grad_norm]), style="quiet", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(first, second) if second else first, refresh=True)
