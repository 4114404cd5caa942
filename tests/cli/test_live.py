"""What a running stage shows, from its events."""

from __future__ import annotations

import pytest
from rich.table import Table

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
