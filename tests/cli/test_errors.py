"""The one error layer: exit codes, the shape on stderr, and the JSON object on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from picollm import errors
from picollm_cli import main

TREE = [
    (errors.PicollmError("a"), 1),
    (errors.ConfigError("a"), 2),
    (errors.HostError("a"), 3),
    (errors.MissingArtifact("a", hint="b"), 4),
    (errors.IntegrityError("a"), 5),
    (errors.RemoteError("a"), 6),
    (errors.WorkerError("a"), 7),
    (errors.OutOfMemory("a"), 7),
    (errors.GateError("a"), 8),
    (errors.Interrupted("a"), 130),
]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the whole command do nothing but raise."""

    def app(**options: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(main, "app", app)


def picollm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "picollm_cli", *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.parametrize(("error", "code"), TREE, ids=lambda value: type(value).__name__)
def test_every_error_has_its_exit_code(
    error: errors.PicollmError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert main._run(["runs", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"] == error.to_dict()
    assert error.to_dict()["exit_code"] == code


def test_the_shape_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, errors.MissingArtifact("no tokenizer", cause="`x` [y] is not there", hint="run `picollm`"))
    assert main._run(["pretrain"]) == 4
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: no tokenizer\n  cause: `x` [y] is not there\n\nhint: run `picollm`\n"


def test_a_bug_shows_a_traceback_and_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert main._run(["runs", "--json"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "picollm doctor --json" in shown.err
    assert json.loads(shown.out)["error"]["cause"] == "ZeroDivisionError: oops"


def test_ctrl_c_outside_a_stage_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main._run(["runs"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["spedrun"], "did you mean `speedrun`?", "picollm --help"),
        (["pretrain", "--stepz"], "no such option: --stepz", "picollm pretrain --help"),
        (["data", "improt"], "did you mean `import`?", "picollm data --help"),
        (["data", "show"], "missing argument `NAME`", "picollm data --help"),
    ],
)
def test_usage_errors_have_the_same_shape(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main._run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and message in shown.err.lower().replace("name", "NAME")
    assert shown.err.endswith(f"\nhint: see `{hint}`\n")


@pytest.mark.parametrize("arguments", [[], ["data"], ["tokenizer"], ["manifest"]])
def test_no_command_shows_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main._run(arguments) == 2
    shown = capsys.readouterr()
    assert "Usage: picollm" in shown.out + shown.err
    assert "error:" not in shown.err


def test_a_real_process_exits_with_the_code(clean_environment: Path) -> None:
    done = picollm("speedrun", "--preset", "demoo", "--json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown preset `demoo`\n  cause: ")
    assert json.loads(done.stdout.splitlines()[-1])["error"]["hint"] == "did you mean `--preset demo`?"
    assert not clean_environment.exists()


def test_a_missing_run_names_the_command_that_makes_one(clean_environment: Path) -> None:
    done = picollm("pretrain")
    assert done.returncode == 4
    assert done.stderr.endswith("\nhint: make one with `picollm speedrun --preset demo`\n")
    assert not clean_environment.exists()


def test_an_unwritable_base_directory_is_a_host_error(tmp_path: Path) -> None:
    """Below a file nobody can make a directory, root included."""
    (tmp_path / "file").write_text("kept")
    done = picollm("speedrun", "--preset", "demo", env=os.environ | {"PICOLLM_BASE_DIR": str(tmp_path / "file/base")})
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: cannot write `{tmp_path}/file/base")
    assert "PICOLLM_BASE_DIR" in done.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_a_reader_that_leaves_is_not_an_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "picollm_cli", "speedrun", "--dry-run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert told == b""
