"""The committed completion scripts are what the command prints, and completing works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "completions"
FILES = {"bash": "picollm.bash", "zsh": "_picollm", "fish": "picollm.fish"}
COMMAND = "import sys; from picollm_cli.main import main; sys.argv[0] = 'picollm'; main()"


def ask(**variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], capture_output=True, text=True, env=os.environ | variables, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", FILES)
def test_the_committed_script_is_fresh(shell: str) -> None:
    """`_PICOLLM_COMPLETE=source_bash picollm | sed '1{/^$/d}' > completions/picollm.bash` makes it again."""
    assert ask(_PICOLLM_COMPLETE=f"source_{shell}").lstrip("\n") == (FOLDER / FILES[shell]).read_text()


def test_zsh_finds_the_script_on_its_path() -> None:
    """It looks for the tag in the first line of a file, and Typer prints an empty one before it."""
    assert (FOLDER / FILES["zsh"]).read_text().startswith("#compdef picollm\n")


def test_a_command_is_completed() -> None:
    found = ask(_PICOLLM_COMPLETE="complete_bash", COMP_WORDS="picollm sp", COMP_CWORD="1")
    assert found.split() == ["speedrun"]


def test_an_option_is_completed() -> None:
    found = ask(_PICOLLM_COMPLETE="complete_bash", COMP_WORDS="picollm speedrun --for", COMP_CWORD="2")
    assert found.split() == ["--force"]
