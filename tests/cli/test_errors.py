"""The one error layer: exit codes, the shape on stderr, and the JSON object on stdout."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from picollm import errors
from picollm_cli import main
from picollm_cli.console import ready_streams, write_json_line

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
    assert process.wait(60) == 141  # as a shell says of programs that SIGPIPE ended
    assert told == b""


# -- where the output goes --------------------------------------------------------------------------------------------

# Neither rich's help nor our own JSON may depend on what stdout can take.
OUTPUTS = (("speedrun", "--help"), ("runs", "--json"))


@pytest.mark.parametrize("arguments", OUTPUTS)
def test_a_terminal_that_knows_ascii_only(arguments: tuple[str, ...]) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = picollm(*arguments, env=os.environ | ascii_only)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("encoding", "written"), [("ascii", '{"a": "\\u00fc\\ud83c\\udf4e"}'), ("utf-8", '{"a": "ü🍎"}')]
)
def test_json_is_json_in_any_encoding(encoding: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(data, encoding=encoding))
    ready_streams()
    write_json_line({"a": "ü🍎"})
    assert data.getvalue().decode(encoding) == written + "\n"
    write_json_line({"path": "caf\udce9"})  # the name of a file in another encoding
    assert json.loads(data.getvalue().splitlines()[1]) == {"path": "caf\udce9"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has this device")
@pytest.mark.parametrize("arguments", OUTPUTS)
def test_a_full_disk_behind_stdout_is_no_bug(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "picollm_cli", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert "error: cannot write the output\n  cause: No space left on device\n" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("speedrun", "--help"), ("speedrun", "--preset", "demo", "--dry-run", "--json")])
def test_a_disk_that_fills_in_the_middle_of_the_output(
    arguments: tuple[str, ...], unbuffered: str, tmp_path: Path
) -> None:
    """With PYTHONUNBUFFERED Python's own stdout drops what did not fit, without a word."""
    line = f"ulimit -f 1; exec {shlex.join([sys.executable, '-m', 'picollm_cli', *arguments])} >{tmp_path / 'output'}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment)
    assert (done.returncode, "error: cannot write the output" in done.stderr) == (3, True)


def test_no_stdin_at_all(tiny_run: Path) -> None:
    line = f"{shlex.quote(sys.executable)} -m picollm_cli chat -p - <&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the prompt is empty\n")


def test_no_stdout_at_all() -> None:
    line = f"{shlex.quote(sys.executable)} -m picollm_cli runs --json >&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("there is no run in")
