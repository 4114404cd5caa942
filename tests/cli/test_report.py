from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from picollm.files import write_json
from picollm.run_dir import RunDir
from picollm_cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(clean_environment: Path) -> RunDir:
    """A run of which the tokenizer is done and nothing else."""
    run = RunDir(clean_environment / "runs" / "demo")
    write_json(run.config_path, {"schema": 1, "preset": "demo", "sources": {}, "config": {}})
    tokenizer = run.tokenizer / "tokenizer.json"
    write_json(tokenizer, {})
    run.stage("tokenizer").write_record({"recipe": "a" * 64}, [tokenizer], {"vocab_size": 1024})
    return run


def picollm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["picollm", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code or 0


def test_prints_path_and_summary(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "report", "--run", "demo") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == str(run.path / "report.md")
    assert any(line.startswith("Tokenizer") and "1,024 tokens" in line for line in lines)
    assert "hint: not finished: pretrain, sft, eval; continue with `picollm speedrun --run demo`" in captured.err
    assert (run.path / "report.md").is_file()


def test_json_is_the_content_of_report_json(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "report", "--json") == 0
    captured = capsys.readouterr().out
    assert len(captured.splitlines()) == 1
    assert json.loads(captured) == json.loads((run.path / "report.json").read_text())


def test_no_run(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "report") == 4
    assert "hint: make one with `picollm speedrun --preset demo`" in capsys.readouterr().err


def test_run_of_another_version(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    write_json(run.config_path, {"schema": 2})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert picollm(monkeypatch, "report") == 5
    assert "was written by another version of picollm" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_help_shows_examples(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "report", "--help") == 0
    assert "picollm report --run demo --json" in capsys.readouterr().out
