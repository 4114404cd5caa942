from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from picollm.errors import ConfigError, IntegrityError, MissingArtifact
from picollm_cli.main import app


def chat(*arguments: str, stdin: str | None = None):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["chat", *arguments], input=stdin, prog_name="picollm", standalone_mode=False)


def answer(*arguments: str) -> dict:
    result = chat(*arguments, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout.splitlines()[-1])


def test_reply_alone_on_stdout(tiny_run: Path) -> None:
    result = chat("-p", "What is 7 plus 5?")
    assert result.exception is None
    said = answer("-p", "What is 7 plus 5?")
    assert result.stdout == said["reply"] + "\n"
    assert said["reply"].strip()
    assert (said["run"], said["stage"], said["step"]) == ("tiny", "sft", 10)
    assert said["finish_reason"] in ("stop", "length")
    text = "".join(part["text"] for part in said["parts"] if part["type"] == "text")
    assert text.strip() == said["reply"]
    assert said["tokens"] >= 1 and said["prompt_tokens"] > 5


def test_greedy_is_repeatable_and_temperature_varies(tiny_run: Path) -> None:
    assert answer("-p", "Hello")["reply"] == answer("-p", "Hello")["reply"]
    said = [answer("-p", "Hello", "--temperature", "1.5") for _ in range(2)]
    assert said[0]["seed"] != said[1]["seed"]
    assert said[0]["reply"] != said[1]["reply"]


def test_prompt_from_stdin(tiny_run: Path) -> None:
    assert chat("-p", "-", stdin="Who are you?\n").stdout == chat("-p", "Who are you?").stdout


def test_system_message_changes_the_prompt(tiny_run: Path) -> None:
    assert answer("-p", "Hi", "--system", "Be brief.")["prompt_tokens"] > answer("-p", "Hi")["prompt_tokens"]


def test_special_tokens_in_user_text_are_text(tiny_run: Path) -> None:
    said = answer("-p", "<|assistant_end|>")
    assert said["prompt_tokens"] > answer("-p", "x")["prompt_tokens"] + 3


def test_base_model_continues_text(tiny_run: Path) -> None:
    said = answer("--stage", "pretrain", "-p", "Once upon a time")
    assert said["stage"] == "pretrain" and said["reply"]
    result = chat("--stage", "pretrain", stdin="Once upon a time\n")
    assert "base model" in result.stderr
    refused = chat("--stage", "pretrain", "--system", "Be brief.", "-p", "Hi")
    assert isinstance(refused.exception, ConfigError)


def test_conversation(tiny_run: Path) -> None:
    """From a pipe: one reply per line, history in the prompt, commands, the end of input."""
    lines = ["Hello", "/reset", "Hello", "", "/help", "/nonsense", "Hello again", "/quit", "never read"]
    result = chat("--json", stdin="\n".join(lines))
    assert result.exception is None
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(replies) == 3
    assert replies[0]["reply"] == replies[1]["reply"], "/reset forgets"
    assert replies[0]["prompt_tokens"] == replies[1]["prompt_tokens"] < replies[2]["prompt_tokens"]
    for said in ("run tiny", "stage sft", "step 10", "parameters", "/reset", "`/nonsense` is not a command"):
        assert said in result.stderr


def test_long_conversations_lose_their_oldest_turns(tiny_run: Path) -> None:
    result = chat("--json", stdin="\n".join(["Tell me something about it."] * 4))
    replies = [json.loads(line) for line in result.stdout.splitlines()]
    assert replies[-1]["turns_dropped"] > 0
    assert all(said["prompt_tokens"] + 16 <= 96 for said in replies)
    assert "left out" in result.stderr


def test_too_long_a_message(tiny_run: Path) -> None:
    result = chat("-p", "word " * 200)
    assert isinstance(result.exception, ConfigError)
    assert "96" in result.exception.cause
    assert result.stdout == ""
    # In a conversation it is told, and the conversation goes on.
    going_on = chat("--json", stdin="word " * 200 + "\nHello\n")
    assert going_on.exception is None and len(going_on.stdout.splitlines()) == 1
    assert "does not fit" in going_on.stderr


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_prompt(tiny_run: Path, text: str) -> None:
    assert isinstance(chat("-p", text).exception, ConfigError)
    assert isinstance(chat("-p", "-", stdin=text).exception, ConfigError)


def test_what_is_missing(tiny_run: Path, clean_environment: Path) -> None:
    assert isinstance(chat("--run", "other", "-p", "Hi").exception, MissingArtifact)
    typo = chat("--stage", "pretrian", "-p", "Hi").exception
    assert isinstance(typo, ConfigError) and "pretrain" in typo.hint
    assert isinstance(chat("--stage", "rl", "-p", "Hi").exception, MissingArtifact)
    (tiny_run / "tokenizer" / "tokenizer.json").unlink()
    missing = chat("-p", "Hi").exception
    assert isinstance(missing, MissingArtifact) and "picollm tokenizer train" in missing.hint


def test_damaged_weights_are_refused(tiny_run: Path) -> None:
    path = tiny_run / "sft/checkpoints/step_000010/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = chat("-p", "Hi").exception
    assert isinstance(damaged, IntegrityError) and str(path) in damaged.message


def test_tokenizer_of_another_model_is_refused(tiny_run: Path) -> None:
    from picollm.data import toy_world
    from picollm.run_dir import StageDir
    from picollm.tokenizer.train import train

    folder = tiny_run / "tokenizer"
    StageDir(folder).write_record({}, train(toy_world.documents(30, 5), 400).save(folder), {})
    other = chat("-p", "Hi").exception
    assert isinstance(other, IntegrityError) and "tokenizer" in other.message


def test_error_layer_of_the_process(clean_environment: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "picollm_cli", "chat", "-p", "Hi", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: there is no run yet") and "hint:" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "MissingArtifact"
