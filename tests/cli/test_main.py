"""The surface of the command: what there is, what it costs to start, what help looks like."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from picollm import __version__
from picollm_cli.main import COMMANDS, PANELS, app

GOLDEN = Path(__file__).parents[1] / "golden" / "cli.json"
HEAVY = set("torch pydantic pyarrow numpy tokenizers matplotlib psutil filelock prompt_toolkit huggingface_hub".split())
SHARED = {"run", "preset", "config", "set", "dry-run", "json", "yes"}
runner = CliRunner()


def leaves() -> dict[str, typing.Callable[..., None]]:
    """Every command by its full name: `speedrun`, `data import` …"""
    found = {}
    for commands in PANELS.values():
        for name, command in commands.items():
            if not isinstance(command, typer.Typer):
                found[name] = command
                continue
            for info in command.registered_commands:
                assert info.callback
                found[f"{name} {info.name or info.callback.__name__.replace('_', '-')}"] = info.callback
    return found


def surface() -> dict[str, list[str]]:
    """Arguments and options of every command, as its help names them."""
    listed = {}
    for name, function in leaves().items():
        hints = typing.get_type_hints(function, include_extras=True)
        entries = []
        for parameter in inspect.signature(function).parameters:
            (info,) = [m for m in hints[parameter].__metadata__ if hasattr(m, "param_decls")]
            if type(info).__name__ == "ArgumentInfo":
                entries.append(info.metavar or parameter.upper())
            else:
                # Inside `Annotated` Typer keeps the first name where a default would stand.
                first = [info.default] if isinstance(info.default, str) else []
                entries.append(" ".join([*first, *(info.param_decls or ())]) or f"--{parameter.replace('_', '-')}")
        listed[name] = entries
    return listed


def test_commands_and_options_are_frozen() -> None:
    """Adding one is a visible act: `python tests/cli/test_main.py` writes the file."""
    assert surface() == json.loads(GOLDEN.read_text())


def test_a_command_has_at_most_six_options_of_its_own() -> None:
    for name, entries in surface().items():
        own = [e for e in entries if e.startswith("-") and e.split()[0].removeprefix("--") not in SHARED]
        assert len(own) <= 6, f"{name}: {own}"


def test_help_lists_the_panels_in_the_pipelines_order() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert re.findall(r"╭─ (\w+) ─", result.output) == ["Options", *PANELS]
    assert re.findall(r"^│ ([a-z]+) ", result.output, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("name", sorted(leaves()))
def test_every_command_shows_examples(name: str) -> None:
    result = runner.invoke(app, [*name.split(), "-h"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"  picollm {name}" in result.output or name == "tokenizer show"


@pytest.mark.parametrize("group", ["", "bench", "data", "tokenizer", "manifest", "export"])
def test_every_group_shows_examples(group: str) -> None:
    result = runner.invoke(app, [*group.split(), "--help"])
    assert result.exit_code == 0 and "Examples:" in result.output


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    result = runner.invoke(app, [flag])
    assert (result.exit_code, result.output) == (0, f"picollm {__version__}\n")


def test_help_tells_the_environment_variable_of_run() -> None:
    assert "[env: PICOLLM_RUN]" in runner.invoke(app, ["pretrain", "--help"]).output


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "picollm_cli", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY


def test_help_starts_quickly() -> None:
    """Median of user and system seconds; the bar is 0.6."""

    def cost() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "picollm_cli", "--help"], capture_output=True, check=True, env=os.environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(cost() for _ in range(5)) <= 0.6


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(surface(), indent=2, ensure_ascii=False) + "\n")


def test_ctrl_c_while_the_command_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    """The first import of the command stands for the moment: it is interrupted there."""
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    search = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from picollm_cli.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
