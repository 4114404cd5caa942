from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from picollm.files import write_json
from picollm.locks import hold_lock
from picollm.run_dir import RunDir
from picollm_cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(clean_environment: Path) -> RunDir:
    run = RunDir(clean_environment / "runs" / "demo")
    write_json(run.config_path, {"schema": 1})
    write_json(run.path / "report.json", {})
    return run


def picollm(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["picollm", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code or 0


def test_write_verify_show(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "manifest", "write", "--run", "demo") == 0
    assert capsys.readouterr().out == f"{run.manifest_path}\n"
    assert picollm(monkeypatch, "manifest", "verify") == 0
    assert capsys.readouterr().out == f"2 files are as recorded in `{run.manifest_path}`\n"
    assert picollm(monkeypatch, "manifest", "show") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in lines] == [["run", "config.json"], ["report", "report.json"]]


def test_json(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "manifest", "write", "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written == {"run": "demo", "path": str(run.manifest_path), "files": 2, "bytes": written["bytes"]}
    assert picollm(monkeypatch, "manifest", "verify", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": "demo", "ok": True, "files": 2, "problems": []}
    assert picollm(monkeypatch, "manifest", "show", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(run.manifest_path.read_text())


def test_verify_exits_5_and_names_the_files(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    picollm(monkeypatch, "manifest", "write")
    (run.path / "report.json").write_text("tampered")
    capsys.readouterr()
    assert picollm(monkeypatch, "manifest", "verify") == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: 1 file differs from the manifest\n  cause: changed  report.json (")
    # The hint names the first stage that makes the damaged files.
    assert "\n\nhint: restore the files, or make them again with `picollm speedrun --run demo --force report`" in (
        captured.err
    )
    assert picollm(monkeypatch, "manifest", "verify", "--json") == 5
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["problems"][0]["path"] == "report.json"
    assert lines[-1]["error"]["exit_code"] == 5


def test_only_new_files_are_no_damage(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    picollm(monkeypatch, "manifest", "write")
    (run.path / "notes.txt").write_text("mine")
    assert picollm(monkeypatch, "manifest", "verify") == 5
    assert "hint: nothing is damaged; list the new files with `picollm manifest write --run demo`" in (
        capsys.readouterr().err
    )


def test_write_waits_for_nobody(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """While a command works on the run its files change, so there is nothing to list."""
    with hold_lock(run.lock_path, "run `demo`"):
        assert picollm(monkeypatch, "manifest", "write") == 3
    assert "run `demo` is in use" in capsys.readouterr().err
    assert not run.manifest_path.exists()


def test_nothing_to_read(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "manifest", "verify") == 4
    assert "hint: make one with `picollm speedrun --preset demo`" in capsys.readouterr().err


def test_manifest_of_another_version(run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    write_json(run.manifest_path, {"schema": 7, "files": []})
    assert picollm(monkeypatch, "manifest", "verify") == 5
    assert "was written by another version of picollm" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["write", "verify", "show"])
def test_help_shows_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert picollm(monkeypatch, "manifest", command, "--help") == 0
    assert f"picollm manifest {command} --run demo --json" in capsys.readouterr().out
