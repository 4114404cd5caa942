"""`picollm export` and `picollm chat --engine` as typed: files, tables, JSON, and asking for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picollm.export import llamacpp, llamacpp_checks
from picollm_cli import file_chat

from .conftest import Command

needs_runtime = pytest.mark.llamacpp


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faster, and what most users have at first."""
    for module in (llamacpp, llamacpp_checks):
        monkeypatch.setattr(module, "version", lambda: None)


def test_list(tiny_run: Path, command: Command, no_runtime: None) -> None:
    ended = command("export", "list", "--json")
    shown = json.loads(ended.out)
    assert shown["run"] == "tiny" and shown["made"] == []
    assert shown["exports"]["gguf"]["possible"] and "multiples of" in shown["exports"]["gguf"]["reason"]
    planned = json.loads(command("speedrun", "--run", "tiny", "--dry-run", "--json").out)["exports"]
    assert planned.keys() == shown["exports"].keys()
    assert command("export", "gguf", "--quant", "F16").code == 0
    (made,) = json.loads(command("export", "list", "--json").out)["made"]
    assert made["ok"] and made["quant"] == "F16" and Path(made["path"]).is_file()
    assert made["path"] in command("export", "list").out


def test_list_says_why_not(tiny_run: Path, command: Command) -> None:
    for stage in ("pretrain", "sft"):
        path = tiny_run / stage / "config.json"
        value = json.loads(path.read_text())
        value["recipe"]["model"]["smear"] = True
        path.write_text(json.dumps(value))
    ended = command("export", "list")
    assert ended.code == 0 and "model.smear" in ended.out


def test_gguf(tiny_run: Path, command: Command, no_runtime: None) -> None:
    ended = command("export", "gguf")
    path = tiny_run / "export/gguf/tiny-sft-Q8_0.gguf"
    assert ended.code == 0 and ended.out.splitlines()[-1] == str(path) and path.is_file()
    assert "not run" in ended.out and ended.out.count("pip install xllamacpp") == 1
    assert not any(line.endswith(" ") for line in ended.out.splitlines()), "a narrow terminal wraps them"
    for told in ("October 2025", "--arch qwen3", "--engine llamacpp", "ollama create"):
        assert told in ended.err
    model = path.with_name("tiny-sft-Q8_0.Modelfile").read_text()
    assert model.startswith("FROM ./tiny-sft-Q8_0.gguf\n") and 'stop "<|assistant_end|>"' in model
    again = command("export", "gguf", "--force", "--json")
    report = json.loads(again.out.splitlines()[-1])
    assert report["path"] == str(path) and report["ok"] and report["modelfile"].endswith(".Modelfile")
    assert [row["name"] for row in report["checks"]][:3] == [
        "tensors", "tensor values, largest relative error", "keys",
    ]  # fmt: skip


def test_a_manifest_goes_on_being_true(tiny_run: Path, command: Command, no_runtime: None) -> None:
    """Exports are listed; what else changed since it was written is still told."""
    assert command("manifest", "write").code == 0
    assert command("export", "gguf").code == 0
    assert command("manifest", "verify").code == 0
    (tiny_run / "environment.json").write_text("{}")
    assert command("export", "gguf", "--quant", "F16").code == 0
    ended = command("manifest", "verify")
    assert ended.code == 5 and "environment.json" in ended.err and "export/" not in ended.err


def test_transformers(tiny_run: Path, command: Command) -> None:
    pytest.importorskip("transformers")
    ended = command("export", "transformers", "--json")
    report = json.loads(ended.out.splitlines()[-1])
    assert ended.code == 0 and report["ok"] and (Path(report["path"]) / "config.json").is_file()


def test_what_cannot_be(tiny_run: Path, refused: Command, no_runtime: None, tmp_path: Path) -> None:
    assert "Q8_0" in refused(2, "export", "gguf", "--quant", "Q8").err
    assert "--arch qwen3" in refused(2, "export", "gguf", "--arch", "qwen").err
    assert "model.gguf" in refused(2, "export", "gguf", "--out", str(tmp_path)).err
    for name in ("model.Modelfile", "model"):
        assert f"{name}.gguf" in refused(2, "export", "gguf", "--out", str(tmp_path / name)).err
    assert "names no licence" in refused(2, "export", "transformers", "--license", "mit: x").err
    assert "rl" in refused(4, "export", "gguf", "--stage", "rl").err
    refused(2, "export", "gguf", "--stage", "sftt")
    refused(4, "export", "gguf", "--run", "other")
    refused(4, "export", "list", "--run", "other")
    refused(2, "export", "transformers", "--dtype", "int8")
    assert "multiples of 256" in refused(2, "export", "gguf", "--quant", "Q4_K_M").err
    assert "llama-quantize" in refused(3, "export", "gguf", "--quant", "IQ4_NL").err


def test_a_file_that_is_there(tiny_run: Path, command: Command, refused: Command, no_runtime: None) -> None:
    mine = tiny_run.parent / "mine.gguf"
    mine.write_text("mine")
    for more in ((), ("--force",)):
        assert "no export of picollm wrote it" in refused(2, "export", "gguf", "--out", str(mine), *more).err
    assert command("export", "gguf").code == 0
    assert "--force" in refused(2, "export", "gguf").err


def test_engines_that_are_none(tiny_run: Path, command: Command, refused: Command, tmp_path: Path) -> None:
    assert "engines are" in refused(2, "chat", "--engine", "llama", "-p", "Hi").err
    assert "engines are" in refused(2, "chat", "--engine", str(tmp_path / "none.gguf"), "-p", "Hi").err
    assert "picollm export gguf --run tiny" in refused(4, "chat", "--engine", "llamacpp", "-p", "Hi").err
    assert "--stage pretrain" in refused(4, "chat", "--engine", "llamacpp", "--stage", "pretrain", "-p", "Hi").err


def test_chat_without_a_runtime(tiny_run: Path, command: Command, no_runtime: None) -> None:
    assert command("export", "gguf").code == 0
    ended = command("chat", "--engine", "llamacpp", "-p", "Hi")
    assert ended.code == 3 and "pip install xllamacpp" in ended.err


@needs_runtime
def test_chat_with_a_file(tiny_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setattr(llamacpp_checks, "version", lambda: None)
        for stage in ("sft", "pretrain"):
            ended = command("export", "gguf", "--stage", stage, "--quant", "F32")
            assert ended.code == 0 and f"--stage {stage} --engine llamacpp" in ended.err
    ended = command("chat", "--engine", "llamacpp", "-p", "Hi", "--json")
    said = json.loads(ended.out)
    assert ended.code == 0 and (said["engine"], said["run"], said["stage"], said["step"]) == (
        "llamacpp",
        "tiny",
        "sft",
        10,
    )
    assert said["prompt_tokens"] > 3 and said["tokens"] >= 1 and "calculator" in ended.err
    assert command("chat", "--engine", "llamacpp", "-p", "Hi").out.strip() == said["reply"]
    base = command("chat", "--engine", "llamacpp", "--stage", "pretrain", "-p", "Once upon a time", "--json")
    assert json.loads(base.out)["stage"] == "pretrain" and "base model" in base.err
    refused = command("chat", "--engine", "llamacpp", "--stage", "pretrain", "--system", "Be brief.", "-p", "Hi")
    assert refused.code == 2 and "chat template" in refused.err
    assert "are used here" not in ended.err
    with monkeypatch.context() as narrow:
        narrow.setattr(file_chat, "MOST_CONTEXT", 40)
        for stage in ("sft", "pretrain"):
            capped = command("chat", "--engine", "llamacpp", "--stage", stage, "-p", "Hi", "--json")
            reply = json.loads(capped.out)
            assert "a context of 96 tokens; 40 are used here" in capped.err
            assert reply["prompt_tokens"] + reply["tokens"] <= 40
        short = command("chat", "--engine", "llamacpp", "-p", "word " * 12)
        assert short.code == 2 and "the context has 40" in short.err
    long = command("chat", "--engine", "llamacpp", "-p", "word " * 200)
    assert long.code == 2 and "96" in long.err
