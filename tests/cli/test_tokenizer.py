from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from picollm.data.importer import import_paths
from picollm.errors import ConfigError, MissingArtifact
from picollm.tokenizer import train as trainer
from picollm_cli.commands.tokenizer import app, visible


@pytest.fixture
def notes(tmp_path: Path) -> str:
    path = tmp_path / "notes.jsonl"
    text = "Every morning of 2024 the postman brings letters to the house by the river."
    path.write_text("".join(json.dumps({"text": f"Day {i}. {text}"}) + "\n" for i in range(100)))
    import_paths("notes", [path])
    return "notes"


def invoke(*arguments: str, **rest: object) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, **rest)


def train(notes: str, *sets: str) -> Result:
    return invoke(
        "train", "--run", "r", "--preset", "cpu-small", "--json",
        "--set", f"data.dataset={notes}", "--set", "tokenizer.vocab_size=320", *sets,
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


def test_two_digits(notes: str):
    made = json.loads(train(notes, "--set", "tokenizer.digits=2").stdout.splitlines()[-1])
    assert made["digits"] == 2
    shown = json.loads(invoke("show", "--run", "r", "--json", "Day 2024").stdout)
    assert [token for token in shown["tokens"] if token.strip().isdigit()] == ["20", "24"]
    with pytest.raises(ConfigError) as caught:
        invoke("train", "--run", "other", "--preset", "cpu-small", "--set", "tokenizer.digits=3")
    assert "tokenizer.digits" in caught.value.message + (caught.value.cause or "")


def test_eval_beside_others(notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(notes)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    alone = invoke("eval", "--run", "r")
    assert "GPT-2 is not measured beside it" in alone.stderr and "GPT-4 is not measured" in alone.stderr
    assert json.loads(invoke("eval", "--run", "r", "--json").stdout)["beside"] == {}

    other = tmp_path / "hf/hub/models--openai-community--gpt2/snapshots/1/tokenizer.json"
    other.parent.mkdir(parents=True)
    other.write_bytes(only_bytes := trainer.train(iter(["q"]), 265).json)
    named = tmp_path / "mine.json"
    named.write_bytes(only_bytes)
    table = invoke("eval", "--run", "r", "--beside", str(named))
    head, *rows = table.stdout.splitlines()
    assert head.split()[-2:] == ["GPT-2", "mine.json"]
    assert rows[0].split()[0] == "validation" and rows[0].split()[-2:] == ["1.00", "1.00"]
    assert f"GPT-2: 265 tokens, `{other}`" in table.stdout
    assert "GPT-4 is not measured" in table.stderr and "GPT-2 is not" not in table.stderr
    measured = json.loads(invoke("eval", "--run", "r", "--json", "--beside", str(named)).stdout)
    assert measured["beside"]["mine.json"]["validation"] == 1.0 < measured["kinds"]["validation"]["bytes_per_token"]
    with pytest.raises(MissingArtifact, match="no tokenizer"):
        invoke("eval", "--run", "r", "--beside", str(tmp_path / "gone.json"))


def test_eval_of_a_mixture_measures_each_dataset(notes: str, tmp_path: Path):
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} silver winters. " * 9}) + "\n" for i in range(100)))
    import_paths("more", [path])
    train(notes, "--set", f"data.mix.{notes}=1", "--set", "data.mix.more=2")
    kinds = json.loads(invoke("eval", "--run", "r", "--json").stdout)["kinds"]
    assert set(list(kinds)[:2]) == {"validation notes", "validation more"}
    assert "validation" not in kinds


def test_colours_and_their_absence(notes: str, monkeypatch: pytest.MonkeyPatch):
    train(notes)
    plain = invoke("show", "--run", "r", "the river").stdout
    assert "\x1b" not in plain and "│" in plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    bright = invoke("show", "--run", "r", "the river").stdout
    assert "│" not in bright
    # Tokens take turns: two neighbours never look the same, and the text is whole without the codes.
    found = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)", bright)
    styles = [(code, text) for code, text in found if code != "0"]
    assert len(styles) > 1 and all(a[0] != b[0] for a, b in itertools.pairwise(styles))
    assert "".join(text for _, text in styles) == "the river"
    monkeypatch.setenv("NO_COLOR", "1")  # stronger than FORCE_COLOR
    assert "│" in invoke("show", "--run", "r", "the river").stdout
    # A control character cannot reach the terminal.
    assert "\x1b[31m" not in invoke("show", "--run", "r", "\x1b[31mred").stdout


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
