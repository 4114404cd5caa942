"""Stock llama.cpp on our files: the real runtime, which is in the `dev` extra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picollm.errors import ConfigError, HostError, IntegrityError
from picollm.export import folding, gguf, llamacpp, llamacpp_ask, llamacpp_checks
from picollm.export.gguf_export import GGUFRequest, default_path, export_gguf
from picollm.export.gguf_types import find_quant
from picollm.export.llamacpp_file import describe
from picollm.export.logits import native_logits
from picollm.export.strings import STRINGS
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir

GOLDEN = Path(__file__).parents[2] / "golden" / "nasty_strings.json"
Made = Callable[..., StageDir]
Trained = Callable[[str], GPT]

needs_runtime = pytest.mark.llamacpp


def exported(stage: StageDir, quant: str = "F32", host: str = "apertus") -> tuple[Path, dict[str, Any]]:
    found = find_quant(quant)
    out = default_path(stage, found, host)
    return out, export_gguf(GGUFRequest(stage, found, host, out, force=True))


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["checks"]}


@needs_runtime
@pytest.mark.parametrize("host", ["apertus", "qwen3"])
@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_float32_is_our_model(make_stage: Made, trained: Trained, host: str, name: str) -> None:
    _, report = exported(make_stage(trained("portable"), name=name), "F32", host)
    found = rows(report)
    assert all(row["passed"] for row in report["checks"])
    assert found["log-probabilities, largest difference"]["value"] <= 1e-4
    assert found["argmax agreement"]["value"] == 1.0 and found["argmax agreement"]["note"].startswith("256 positions")
    assert found["token ids"]["value"] == "0 differ" and len(STRINGS) >= 100
    assert found["greedy replies"]["value"] == "4 of 4 are ours"
    assert ("chat prompt" in found) == (name == "sft")


@needs_runtime
@pytest.mark.parametrize(("quant", "kl"), [("F16", 1e-3), ("Q8_0", 5e-3)])
def test_rounded_weights_say_nearly_the_same(make_stage: Made, trained: Trained, quant: str, kl: float) -> None:
    _, report = exported(make_stage(trained("portable")), quant)
    assert 0 < rows(report)["KL, nats per token"]["value"] <= kl


@needs_runtime
def test_a_wrong_activation_is_noticed(make_stage: Made, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as its table says; only the runtime can tell that the table is wrong."""
    monkeypatch.setitem(gguf.XIELU, "alpha_p", 0.6)
    with pytest.raises(IntegrityError) as refused:
        exported(make_stage(trained("portable")))
    assert "log-probabilities" in str(refused.value.cause) and "keys" not in str(refused.value.cause)


@needs_runtime
def test_runtime_as_users_start_it(make_stage: Made, trained: Trained) -> None:
    """Tokens of a larger fixture, log-probabilities through the usual float16 cache, a chat that stops, errors."""
    stage = make_stage(trained("portable"))
    path, _ = exported(stage)
    checkpoint = folding.open_checkpoint(stage)
    tokenizer = folding.open_tokenizer(checkpoint)
    runtime = llamacpp.Runtime(path, context=checkpoint.arch.max_position_embeddings, threads=1)
    strings = [entry["text"] for entry in json.loads(GOLDEN.read_text())["strings"]]
    assert len(strings) >= 100
    assert [text for text in strings if runtime.tokenize(text) != tokenizer.encode(text)] == []
    ids = [tokenizer.bos, *tokenizer.encode("Once upon a time there was a fox.")]
    (logits,) = native_logits(checkpoint, [ids])
    for position in (0, 3, len(ids) - 1):
        found = runtime.log_probs(ids[: position + 1], tokenizer.vocab_size)
        assert np.abs(found - logits[position].double().log_softmax(-1).numpy()).max() <= 1e-2
    pieces: list[str] = []
    question = [{"role": "user", "content": "Who are you?"}]
    reply = runtime.answer(question, temperature=0, seed=0, on_text=pieces.append)
    assert reply["text"] == "".join(pieces) == "I am a toy model, trained to test exports."
    assert reply["finish_reason"] == "stop" and len(pieces) > 3 and reply["prompt_tokens"] > 5

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.answer(question, temperature=0, seed=0, on_text=stop)
    with pytest.raises(ConfigError):
        runtime.answer([{"role": "user", "content": "word " * 1000}], temperature=0, seed=0, on_text=pieces.append)
    about = describe(path)
    assert (about.run, about.stage, about.step, about.is_chat) == ("test", "sft", 10, True)


@needs_runtime
def test_files_that_are_none(tmp_path: Path) -> None:
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(IntegrityError):
        llamacpp.Runtime(torn, context=16)
    with pytest.raises(IntegrityError):
        describe(torn)
    question = llamacpp_ask.Question(str(torn), 16, 1, 10, [[0]], 1, [], [], 8)
    trouble = llamacpp_ask.ask(question)
    assert isinstance(trouble, llamacpp_ask.Trouble) and "cannot load" in trouble.text and not trouble.killed


def test_a_runtime_that_dies_is_told_apart(
    make_stage: Made, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A broken AMX ends the process: that row is not run. On any other CPU, or in float32, it is a failure."""
    monkeypatch.setattr(llamacpp_checks, "version", lambda: "1")
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -ILL $$\n")
    program.chmod(0o700)
    monkeypatch.setattr(llamacpp_ask.sys, "executable", str(program))
    monkeypatch.setattr(llamacpp_checks, "_has_amx", lambda: True)
    _, report = exported(make_stage(trained("portable")), "Q8_0")
    notes = [row["note"] for row in report["checks"] if row["result"] == "not run"]
    assert len(notes) == 8 and all("broken AMX" in note for note in notes)
    with pytest.raises(IntegrityError) as refused:
        exported(make_stage(trained("portable"), run="other"), "F32")
    assert "ended by signal 4" in str(refused.value.cause)


@needs_runtime
@pytest.mark.parametrize(
    "content",
    ["raise ImportError('no libgomp')", "raise RuntimeError('no AVX2')", "class CommonParams: __slots__ = ('old',)"],
)
def test_a_runtime_that_does_not_work_here_is_not_the_fault_of_the_file(
    make_stage: Made, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    (tmp_path / "xllamacpp.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _, report = exported(make_stage(trained("portable")))
    notes = [row["note"] for row in report["checks"] if row["passed"] is None]
    assert report["ok"] and len(notes) == 8 and all("cannot be used here" in note for note in notes)


def test_a_runtime_without_records_of_its_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama_of_mine.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(llamacpp, "PACKAGE", "llama_of_mine")
    assert llamacpp.version() == "of unknown version"
    monkeypatch.setattr(llamacpp, "PACKAGE", "llama_of_nobody")
    assert llamacpp.version() is None


def test_without_a_runtime_the_rows_say_how_to_get_one(
    make_stage: Made, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_checks, "version", lambda: None)
    _, report = exported(make_stage(trained("portable")))
    notes = [row["note"] for row in report["checks"] if row["passed"] is None]
    assert report["ok"] and len(notes) == 8 and all("pip install xllamacpp" in note for note in notes)
    monkeypatch.setattr(llamacpp, "version", lambda: None)
    with pytest.raises(HostError):
        llamacpp.Runtime(Path("any.gguf"), context=16)
