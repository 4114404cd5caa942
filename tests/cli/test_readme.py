"""What the README and the pages tell a user to type is accepted: commands, options, config keys, make targets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from picollm.config.presets import PRESETS
from picollm.config.resolve import known_keys
from picollm_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/learn/README.md", "docs/export.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def lines_of_blocks(page: str) -> list[str]:
    lines = "".join(blocks(page, "bash")).splitlines()
    return [line for line in lines if line.strip()]


def commands() -> list[str]:
    """Every command line: in blocks, and in running text between backticks."""
    found = []
    for page in PAGES:
        found += [line for line in lines_of_blocks(page) if re.match(r"(\.venv/bin/)?picollm ", line)]
        found += re.findall(r"`(picollm [^`]+)`", (ROOT / page).read_text())
    return list(dict.fromkeys(found))


def parse(line: str) -> dict[str, object]:
    """The parameters of a command line as the command would get them; what Typer refuses raises."""
    _, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(command.name, words).params


def test_there_are_commands() -> None:
    assert len(commands()) >= 15


@pytest.mark.parametrize("line", commands())
def test_command_line_is_accepted(line: str) -> None:
    parameters = parse(line)
    assert parameters.get("preset") in (None, *PRESETS)
    for setting in parameters.get("sets") or parameters.get("set_") or []:
        if setting != "section.key=value":
            assert setting.partition("=")[0] in known_keys()


def test_a_wrong_line_would_be_noticed() -> None:
    with pytest.raises(typer.TyperException):
        parse("picollm speedrun --presett demo")
    with pytest.raises(KeyError):
        parse("picollm speeedrun")


def test_every_command_is_in_the_readme() -> None:
    named = {line.split()[1] for line in commands()}
    assert set(typer.main.get_command(app).commands) <= named


def test_other_lines_are_known() -> None:
    """Besides picollm the README asks for make, a venv and pip, all of which are there."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines_of_blocks("README.md"):
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert set(words) <= set(targets)
        else:
            assert line.startswith((".venv/bin/", "picollm ", "python3 -m venv .venv"))


def test_environment_variables_and_toml() -> None:
    readme = (ROOT / "README.md").read_text()
    for section, key in re.findall(r"PICOLLM_([A-Z]+)__([A-Z_]+)=", readme):
        assert f"{section}.{key}".lower() in known_keys()
    import tomllib

    for text in blocks("README.md", "toml"):
        assert {f"{s}.{key}" for s, values in tomllib.loads(text).items() for key in values} <= set(known_keys())


def test_nobody_is_sent_to_the_foreign_package() -> None:
    for page in ("README.md", "CHANGELOG.md", "docs/code-map.md", "docs/learn/README.md"):
        assert not re.search(r"pip install (-\S+ )*picollm", (ROOT / page).read_text())


def test_exit_codes_are_those_of_the_errors() -> None:
    from picollm import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "exit_code")]
    listed = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)))
    assert listed == {0} | {error.exit_code for error in classes}
