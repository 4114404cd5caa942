"""What a running stage shows, from its events."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table

from picollm_cli import live
from picollm_cli.console import Output
from picollm_cli.live import Progress, StageView


def test_time_left_counts_steps_not_events() -> None:
    """Training tells of every step, an evaluation of many tokens at once: both are steps at some pace."""
    training, evaluation = Progress(), Progress()
    for progress in (training, evaluation):
        progress.update({"kind": "stage_start", "total_steps": 100})
    for step in range(1, 11):
        training.update({"kind": "step", "step": step, "dt_s": 0.5})
    evaluation.update({"kind": "step", "step": 10, "dt_s": 5.0})
    assert training.left_s == evaluation.left_s == pytest.approx(45.0)
    assert evaluation.line("eval chat") == "eval chat 10/100  45 s left"


def test_a_line_has_every_figure_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    progress = Progress("waiting for 1 other node at h:1", usd_per_hour=24.0)
    now += 4
    assert progress.line("pretrain") == "pretrain  waiting for 1 other node at h:1 4 s  about 0.03 USD so far"
    progress.update({"kind": "stage_start", "total_steps": 5568, "resumed_from": 0})
    progress.update({"kind": "phase", "text": "compiling…"})
    now += 21
    assert progress.doing() == "compiling… 21 s"
    for share in ("evaluating…", "evaluating, 40% done…"):
        progress.update({"kind": "phase", "text": share})
        now += 3
    assert progress.doing() == "evaluating, 40% done… 6 s"  # of the whole, not since the last share
    step = {"kind": "step", "step": 1, "loss": 3.5, "tokens_per_s": 557_000.0, "mfu": 0.5213, "mem_gib": 62.3}
    progress.update(step | {"grad_norm": 0.4, "dt_s": 2.0})
    now += 3569
    assert progress.line("pretrain") == (
        "pretrain 1/5,568  loss 3.500  557,000 tok/s  MFU 52.1 %  62.3 GiB  3 h 05 min left  about 24.00 USD so far"
    )
    assert progress.grad_norm == 0.4


def test_a_restart_by_torchrun_is_told_and_starts_the_figures_anew(capsys: pytest.CaptureFixture[str]) -> None:
    view = StageView(Output(), "pretrain")
    view.show({"kind": "stage_start", "total_steps": 20, "resumed_from": 0})
    view.show({"kind": "step", "step": 12, "loss": 1.0, "dt_s": 0.1})
    view.show({"kind": "stage_start", "total_steps": 20, "resumed_from": 10})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: pretrain: a process died and all were started again, from step 10"
    assert (view.progress.step, view.progress.loss, view.progress.left_s) == (10, None, None)


def test_the_live_lines_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = Output()
    drawn = io.StringIO()
    out.stderr.file = drawn
    with StageView(out, "pretrain", usd_per_hour=24.0) as view:
        view.show({"kind": "stage_start", "total_steps": 5568, "resumed_from": 0})
        step = {"kind": "step", "step": 1, "loss": 3.5, "tokens_per_s": 1_234_567.0, "mfu": 0.5213, "mem_gib": 62.3}
        view.show(step | {"grad_norm": 0.4213, "dt_s": 2.0})
        drawn.truncate(0)
        view._draw()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue())
        last = text.replace("\r", "").replace("\0", "").splitlines()[-2:]
    assert last[0].startswith("pretrain ") and last[0].rstrip().endswith(
        "1/5,568 3 h 05 min left  about 0.00 USD so far"
    )
    assert last[1].rstrip() == "loss 3.500  1,234,567 tok/s  MFU 52.1 %  62.3 GiB  grad norm 0.421"
    assert max(map(len, last)) <= 80


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """`TERM=dumb` is a terminal on which nothing can be drawn again: without lines it would stay empty for hours."""
    now = 100.0
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    monkeypatch.setenv("FORCE_COLOR", "1")  # counts as a terminal
    monkeypatch.setenv("TERM", "dumb")
    out = Output()
    out.stderr.file = drawn = io.StringIO()
    with StageView(out, "pretrain") as view:
        view.show({"kind": "stage_start", "total_steps": 10})
        view.show({"kind": "step", "step": 4, "loss": 3.5})
        now += 6
        view.tick()
        assert drawn.getvalue() == "pretrain 4/10  loss 3.500\n"


def test_a_sample_is_one_line_that_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    view = StageView(Output(), "eval samples")
    view.show({"kind": "sample", "prompt": "Who are you?", "text": "I am\n\x1b[31mpicollm." + " more" * 100})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval samples: Who are you? → I am [31mpicollm. more")
    assert line.endswith("…") and "\x1b" not in line


def test_no_cell_of_a_table_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    table = Table(box=None)
    for heading in ("run", "preset"):
        table.add_column(heading)
    table.add_row("a-run-with-a-long-name", "a-preset-with-a-long-name")
    out = Output()
    out.table(table)
    assert "a-run-with-a-long-name  a-preset-with-a-long-name" in capsys.readouterr().out
    assert out.stdout.width == 20
