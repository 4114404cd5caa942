from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from picollm.data.importer import import_paths
from picollm_cli.commands.tokenizer import app, visible


@pytest.fixture
def notes(tmp_path: Path) -> str:
    path = tmp_path / "notes.jsonl"
    text = "Every morning the postman brings letters to the house by the river."
    path.write_text("".join(json.dumps({"text": f"Day {i}. {text}"}) + "\n" for i in range(100)))
    import_paths("notes", [path])
    return "notes"


def invoke(*arguments: str, **rest: object) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, **rest)


def train(notes: str) -> Result:
    return invoke(
        "train", "--run", "r", "--preset", "cpu-small", "--json",
        "--set", f"data.dataset={notes}", "--set", "tokenizer.vocab_size=320",
    )  # fmt: skip


def picollm(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "picollm_cli", *arguments], capture_output=True, env=dict(os.environ))


def test_train_then_train_again_then_show(notes: str):
    result = train(notes)
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout.splitlines()[-1])
    assert (made["run"], made["skipped"]) == ("r", False)
    assert 265 < made["vocab_size"] <= 320
    assert json.loads(train(notes).stdout.splitlines()[-1]) == made | {"skipped": True}

    shown = json.loads(invoke("show", "--run", "r", "--json", "the river <|bos|>").stdout)
    assert "".join(shown["tokens"]) == "the river <|bos|>"
    assert len(shown["ids"]) == len(shown["tokens"])
    assert max(shown["ids"]) < made["vocab_size"] - 9
    assert shown["bytes"] == 17
    plain = invoke("show", "--run", "r", "the river")
    assert plain.stdout.strip().replace("│", "") == "the river"
    assert "│" in plain.stdout
    piped = invoke("show", "--run", "r", "--json", "-", input="the river\n")
    assert "".join(json.loads(piped.stdout)["tokens"]) == "the river\n"

    measured = json.loads(invoke("eval", "--run", "r", "--json").stdout)
    assert list(measured["kinds"]) == ["validation", "prose", "code", "numbers", "other scripts"]
    assert measured["kinds"]["validation"]["bytes_per_token"] > 2
    assert measured["round_trip_failed"] == []
    assert measured["unknown_bytes"] == 0
    table = invoke("eval", "--run", "r")
    assert "other scripts" in table.stdout
    assert "unknown bytes 0" in table.stdout


def test_errors_have_codes_and_say_what_to_do(notes: str, clean_environment: Path):
    missing = picollm("tokenizer", "show", "hello")
    assert missing.returncode == 4
    assert b"there is no run yet" in missing.stderr
    train(notes)
    path = clean_environment / "runs" / "r" / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])
    before = path.read_bytes()
    torn = picollm("tokenizer", "eval", "--run", "r", "--json")
    assert torn.returncode == 5
    assert b"hint: make it again" in torn.stderr
    assert json.loads(torn.stdout.splitlines()[-1])["error"]["type"] == "IntegrityError"
    assert path.read_bytes() == before
    again = json.loads(train(notes).stdout.splitlines()[-1])
    assert again["skipped"] is False
    assert invoke("eval", "--run", "r").exit_code == 0


def test_text_that_is_not_utf_8(notes: str):
    train(notes)
    result = subprocess.run(
        [sys.executable, "-m", "picollm_cli", "tokenizer", "show", "--run", "r", "-"],
        input=b"a\xff\xfe", capture_output=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert b"error: the text is not UTF-8" in result.stderr


def test_visible_bytes():
    assert visible(b"caf\xc3\xa9") == "café"
    assert visible(b"\xc3") == "<C3>"
    assert visible(b"\x1b[0m\n\t") == "<1B>[0m\n\t"


@pytest.mark.parametrize("command", ["train", "eval", "show"])
def test_help_shows_examples(command: str):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"picollm tokenizer {command}" in result.stdout
