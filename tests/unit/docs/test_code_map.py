"""Every path and every command in the code map exists, and no room of the library is missing from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from picollm_cli.main import app

ROOT = Path(__file__).resolve().parents[3]
NANOCHAT_FOLDERS = ("nanochat/", "scripts/", "tasks/", "runs/")


def rows() -> list[list[str]]:
    """The cells of every row that names a file."""
    lines = (ROOT / "docs" / "code-map.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[1].startswith("`")]


def test_the_table_is_there() -> None:
    assert len(rows()) >= 40
    assert {len(row) for row in rows()} == {4}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1].strip("`"))
def test_row(row: list[str]) -> None:
    _, ours, theirs, command = row
    assert (ROOT / ours.strip("`")).is_file()
    assert theirs == "–" or theirs.strip("`").startswith(NANOCHAT_FOLDERS)
    if command:
        found = typer.main.get_command(app)
        program, *words = command.strip("`").split()
        assert program == "picollm"
        for word in words:
            found = found.commands[word]  # KeyError: no such command
        assert not hasattr(found, "commands"), "a group does nothing by itself"


def test_every_room_is_on_the_map() -> None:
    named = {row[1].strip("`") for row in rows()}
    rooms = {path.parent.name for path in (ROOT / "picollm").glob("*/__init__.py")}
    assert rooms == {match[1] for name in named if (match := re.match(r"picollm/(\w+)/", name))}


def test_every_command_is_on_the_map() -> None:
    named = {row[3].strip("`").split()[1] for row in rows() if row[3]}
    assert named == set(typer.main.get_command(app).commands)


def test_links() -> None:
    for page in ("docs/code-map.md", "docs/export.md", "docs/learn/README.md", "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
    for name in re.findall(r"`(picollm/[\w/]+\.py)`", (ROOT / "docs/learn/README.md").read_text()):
        assert (ROOT / name).is_file(), name
