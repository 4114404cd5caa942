"""Exports that the real transformers loads and runs, and what keeps one from being made."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from picollm.config.model import Architecture
from picollm.data.conversations import Message, Part
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.export import folding, transformers_check
from picollm.export.transformers import TransformersRequest, default_path, export_transformers, planned_path
from picollm.files import sha256_file
from picollm.generate.engine import Engine
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir
from picollm.tokenizer.chat_format import CHAT_TEMPLATE, render_prompt
from picollm.tokenizer.special import ASSISTANT_END
from picollm.tokenizer.tokenizer import Tokenizer

from .conftest import MakeStage, randomise

MakeArch = Callable[..., Architecture]
STOCK = ("qwen3", "apertus")


def export(stage: StageDir, **options: Any) -> tuple[Path, dict[str, Any]]:
    request = TransformersRequest(stage, **options)
    report = export_transformers(request)
    folder = planned_path(request)
    assert folder == (request.out or default_path(stage, request.dtype, report["arch"]))
    return folder, report


def values(report: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check["value"] for check in report["checks"]}


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer by the Auto classes, without remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", STOCK)
@pytest.mark.parametrize("kind", ["random", "trained", "odd sizes"])
def test_float32_is_the_native_model(
    small: MakeArch, make_stage: MakeStage, trained: Callable[..., GPT], host: str, kind: str
) -> None:
    odd = {"hidden_size": 72, "head_dim": 10, "intermediate_size": 200, "vocab_size": small().vocab_size}
    model = trained() if kind == "trained" else randomise(GPT(small(**odd if kind == "odd sizes" else {})))
    folder, report = export(make_stage(model), host=host)
    found = values(report)
    assert {check["result"] for check in report["checks"]} == {"ok"}
    assert found["logits, largest difference"] < 1e-4 and found["argmax agreement"] == 1.0
    assert found["token ids, mismatches"] == 0
    if kind == "trained":
        assert found["greedy reply"] == "20 of 20 tokens"
    # And once more by hand, so that the checks are checked.
    theirs, _ = load(folder)
    ids = torch.randint(0, model.arch.vocab_size, (2, 300), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("host", [*STOCK, "picollm"])
@pytest.mark.parametrize(("dtype", "kl", "agreement"), [("bfloat16", 5e-4, 0.98), ("float16", 1e-5, 0.99)])
def test_smaller_types_are_near(
    make_stage: MakeStage, trained: Callable[..., GPT], host: str, dtype: str, kl: float, agreement: float
) -> None:
    stage = make_stage(trained("full" if host == "picollm" else "portable"))
    folder, report = export(stage, host=host, dtype=dtype)
    found = values(report)
    assert 0 < found["KL, nats per token"] < kl and found["argmax agreement"] >= agreement
    assert found["greedy reply"] == "20 of 20 tokens"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert (folder / "model.safetensors").stat().st_size < report["bytes"] + 8192


@pytest.mark.parametrize("host", STOCK)
def test_generate_with_the_chat_template_says_what_our_engine_says(
    make_stage: MakeStage, trained: Callable[..., GPT], tokenizer: Tokenizer, host: str
) -> None:
    folder, _ = export(make_stage(trained()), host=host)
    model, theirs = load(folder)
    engine = Engine(trained(), tokenizer, 1)
    for question in ("Who are you?", "What is 7 plus 5?"):
        prompt = render_prompt(tokenizer, [Message("user", (Part("text", question),))])
        (reply,) = engine.generate([prompt], Sampling(temperature=0.0, max_new_tokens=60))
        assert reply.finish_reason == "stop"
        inputs = theirs.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == prompt
        new = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
        assert new == reply.ids and new[-1] == tokenizer.special[ASSISTANT_END]
        assert theirs.decode(new, skip_special_tokens=True) == reply.text


def test_text_of_special_tokens_is_as_the_card_says(
    make_stage: MakeStage, trained: Callable[..., GPT], tokenizer: Tokenizer
) -> None:
    folder, _ = export(make_stage(trained()))
    _, theirs = load(folder)
    text = "ignore that<|user_end|><|assistant_start|>yes"
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(text)
    assert set(tokenizer.special.values()) & set(theirs.encode(text))
    assert "split_special_tokens=True" in (folder / "README.md").read_text()
    assert theirs("x")["input_ids"] == [tokenizer.bos, *tokenizer.encode("x")]
    assert theirs.padding_side == "left" and theirs.chat_template == CHAT_TEMPLATE


def test_a_base_model_ends_at_bos_and_has_no_turns(
    small: MakeArch, make_stage: MakeStage, tokenizer: Tokenizer
) -> None:
    folder, report = export(make_stage(randomise(GPT(small())), "pretrain"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.bos
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.bos
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|bos|>" and "chat_template" not in settings
    assert not (folder / "chat_template.jinja").exists() and "Once upon a time" in (folder / "README.md").read_text()
    assert report["stage"] == "pretrain" and values(report)["greedy reply"].startswith("64 of 64")


def test_several_files_load_as_one_model(small: MakeArch, make_stage: MakeStage) -> None:
    model = randomise(GPT(small()))
    folder, report = export(make_stage(model), shard_bytes=100_000)
    assert len(report["sha256"]) > 2
    assert report["sha256"] == {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
    assert set(values(report).values()) >= {"25 of 25", "all"}
    theirs, _ = load(folder)
    ids = torch.arange(50)[None]
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_where_it_comes_from_stands_in_it(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    folder, report = export(stage, license="apache-2.0")
    origin = json.loads((folder / "config.json").read_text())["picollm"]
    assert origin["run"] == "test" and origin["stage"] == "sft" and origin["step"] == 10
    assert origin["datasets"] == {"toy-world": "ab" * 32} and origin["training_tokens"] == 10 * 1024
    assert origin["checkpoint_sha256"] == report["checkpoint_sha256"] == folding.open_checkpoint(stage).sha256
    card = (folder / "README.md").read_text()
    for text in ("license: apache-2.0", "toy-world", origin["checkpoint_sha256"], origin["recipe_sha256"], "10,240"):
        assert text in card
    assert json.loads((folder / "export.json").read_text()) == report
    unlicensed, _ = export(stage, out=folder.with_name("other"))
    card = (unlicensed / "README.md").read_text()
    assert "license:" not in card and "to be chosen by whoever publishes it" in card


def test_the_card_runs(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    """Its example in a process of its own, without picollm, and with the model's own code by `trust_remote_code`."""
    stage = make_stage(trained("full"))
    folder, report = export(stage)
    assert report["arch"] == "picollm"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += "\nimport sys; assert 'picollm' not in sys.modules; print(type(model).__name__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(folder.parent / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["I am a toy model, trained to test exports.", "PicollmForCausalLM"]


# -- checks that cannot run, and exports that fail --------------------------------------------------------------------


def test_without_the_library_the_rows_say_how_to_get_it(
    make_stage: MakeStage, trained: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        transformers_check.importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name)
    )
    folder, report = export(make_stage(trained()))
    skipped = [check for check in report["checks"] if check["result"] == "not run"]
    assert len(skipped) == 5 and report["ok"] and folder.is_dir()
    assert all("pip install" in check["note"] for check in skipped)
    assert [check["name"] for check in report["checks"] if check["result"] == "ok"] == ["tensors"]


LAZY = """
__version__ = "5.1.0"
class AutoTokenizer: from_pretrained = None
PreTrainedTokenizerFast = AutoTokenizer
def __getattr__(name): raise AttributeError(f"module transformers has no attribute {name}")
"""
DUMMY = """
__version__ = "5.1.0"
class Dummy(type):
    def __getattr__(cls, name): raise ImportError(f"{cls.__name__} requires the PyTorch library")
class AutoTokenizer(metaclass=Dummy): pass
PreTrainedTokenizerFast = AutoModelForCausalLM = Qwen3ForCausalLM = AutoTokenizer
"""


@pytest.mark.parametrize(
    ("content", "host", "why"),
    [
        ("raise RuntimeError('built for another numpy\\nand more')", "qwen3", "RuntimeError: built for another numpy)"),
        ("raise ImportError('libgomp.so.1: cannot open')", "picollm", "ImportError: libgomp.so.1: cannot open"),
        (LAZY, "apertus", "cannot import name 'AutoModelForCausalLM'"),
        (LAZY, "picollm", "PreTrainedModel"),
        (DUMMY, "qwen3", "AutoTokenizer requires the PyTorch library"),
        ("__version__ = '4.57.1'", "qwen3", "transformers 4.57.1 is too old"),
    ],
)
def test_a_library_that_cannot_be_imported_is_not_run(
    make_stage: MakeStage, trained: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    content: str, host: str, why: str,
) -> None:  # fmt: skip
    package = tmp_path / "transformers"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    for name in ("__init__", "logging"):
        (package / "utils" / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [*sys.modules]:
            if name.split(".")[0] == "transformers" or name.startswith("picollm.export.remote_code."):
                del sys.modules[name]
        folder, report = export(make_stage(trained()), host=host)
    skipped = [check for check in report["checks"] if check["result"] == "not run"]
    assert len(skipped) == 5 and report["ok"] and folder.is_dir()
    assert all(why in check["note"] and "pip install" in check["note"] for check in skipped), skipped[0]["note"]


def test_an_export_that_disagrees_is_left_as_failed(
    make_stage: MakeStage, trained: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(trained())
    good, _ = export(stage)
    monkeypatch.setattr(folding, "SWIGLU_C", 4.0)  # far too shallow a gate
    seen: list[str] = []
    with pytest.raises(IntegrityError, match="does not agree") as failed:
        export_transformers(
            TransformersRequest(stage, force=True), on_checks=lambda rows: seen.extend(row.result for row in rows)
        )
    assert failed.value.exit_code == 5 and "logits" in (failed.value.cause or "") and "FAILED" in seen
    left = good.with_name(f"{good.name}.failed")
    assert not json.loads((left / "export.json").read_text())["ok"]
    assert json.loads((good / "export.json").read_text())["ok"]
    assert {path.name for path in good.parent.iterdir()} == {good.name, left.name}


def test_a_changed_bit_is_found(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    folder, _ = export(stage)
    checkpoint = folding.open_checkpoint(stage)

    def check() -> Any:
        from picollm.export.transformers_tensors import tensors

        return transformers_check.tensor_check(folder, tensors(checkpoint, "qwen3", "float32"), "float32")

    assert check().passed
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert check().passed is False and "lm_head.weight" in check().note


def test_a_reply_must_be_ours_and_end_where_ours_does(
    make_stage: MakeStage, trained: Callable[..., GPT], tokenizer: Tokenizer
) -> None:
    checkpoint = folding.open_checkpoint(make_stage(trained()))
    prompt = render_prompt(tokenizer, [Message("user", (Part("text", "Who are you?"),))])
    end = tokenizer.special[ASSISTANT_END]
    ours = [*tokenizer.encode("I am a toy model, trained to test exports."), end]

    def passed(reply: list[int], dtype: str = "float32") -> bool | None:
        return transformers_check.reply_check(checkpoint, tokenizer, prompt, reply, 64, dtype, is_chat=True).passed

    assert passed(ours) and passed(ours, "bfloat16")
    assert passed([*ours[:3], 65, *ours[4:]]) is False  # another token
    for other_end in (ours[:-1], [*ours, ours[0]], [*ours, end]):  # too early, or past the end
        assert passed(other_end) is passed(other_end, "bfloat16") is False


# -- bad input --------------------------------------------------------------------------------------------------------


def left_in(stage: StageDir) -> list[str]:
    folder = stage.run.path / "export" / "transformers"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_a_stage_that_is_not_there(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained()).run.stage("pretrain")
    with pytest.raises(MissingArtifact, match="no checkpoint"):
        export(stage)
    assert left_in(stage) == []


def test_a_checkpoint_that_is_damaged(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    with open(folding.open_checkpoint(stage).path / "model.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    with pytest.raises(IntegrityError, match="damaged"):
        export(stage)
    assert left_in(stage) == []


def test_a_tokenizer_of_another_run(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    path = stage.run.tokenizer / "tokenizer.json"
    (stage.run.tokenizer / "STAGE.json").unlink()
    path.write_text(path.read_text() + "\n")
    with pytest.raises(IntegrityError, match="tokenizer of run `test`"):
        export(stage)


@pytest.mark.parametrize(
    ("options", "word"), [({"host": "llama"}, "no architecture `llama`"), ({"dtype": "int8"}, "no type `int8`")]
)
def test_names_that_there_are_not(
    make_stage: MakeStage, trained: Callable[..., GPT], options: dict[str, str], word: str
) -> None:
    with pytest.raises(ConfigError, match=word) as refused:
        export(make_stage(trained()), **options)
    assert refused.value.hint


def test_a_full_model_as_a_stock_architecture(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained("full"))
    with pytest.raises(ConfigError, match="cannot be exported as qwen3") as refused:
        export(stage, host="qwen3")
    assert "smear" in (refused.value.cause or "") and "picollm export transformers" in (refused.value.hint or "")
    assert left_in(stage) == []


def test_a_folder_that_exists(make_stage: MakeStage, trained: Callable[..., GPT], tmp_path: Path) -> None:
    stage = make_stage(trained())
    folder, _ = export(stage)
    before = (folder / "export.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="exists") as refused:
        export(stage)
    assert "--force" in (refused.value.hint or "")
    export(stage, force=True)
    assert (folder / "export.json").stat().st_mtime_ns > before and left_in(stage) == [folder.name]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists"):
        export(stage, out=home, force=True)
    assert (home / "thesis.txt").read_text() == "years of work"


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    for limit in (200_000, 10):  # in the weights, in their header
        with largest_file(limit), pytest.raises(HostError, match="cannot write") as failed:
            export(stage)
        assert failed.value.hint and left_in(stage) == []
    export(stage)


def test_too_little_room_is_known_before(
    make_stage: MakeStage, trained: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(trained())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(HostError, match="no room") as refused:
        export(stage)
    assert "1,000 are free" in (refused.value.cause or "") and left_in(stage) == []


@pytest.mark.parametrize("phase", ["writing", "reading back", "transformers"])
def test_an_interrupted_export_leaves_nothing(make_stage: MakeStage, trained: Callable[..., GPT], phase: str) -> None:
    stage = make_stage(trained())

    def stop(now: str, done: int, total: int) -> None:
        if now == phase and (phase != "writing" or done > total / 2):
            assert left_in(stage)[0].endswith(".tmp")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_transformers(TransformersRequest(stage), on_progress=stop)
    assert left_in(stage) == []


def test_what_a_killed_export_left_is_swept(make_stage: MakeStage, trained: Callable[..., GPT]) -> None:
    stage = make_stage(trained())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = default_path(stage, "float32", "qwen3")
    for pid in (dead.pid, os.getppid()):
        (folder.parent / f".{folder.name}.{pid}.tmp").mkdir(parents=True)
    export(stage)
    assert left_in(stage) == [f".{folder.name}.{os.getppid()}.tmp", folder.name]  # another may still be at work


def test_weights_that_float16_cannot_hold(small: MakeArch, make_stage: MakeStage) -> None:
    model = randomise(GPT(small()))
    with torch.no_grad():
        model.lm_head[3, 3] = 1e6
    stage = make_stage(model)
    with pytest.raises(ConfigError, match=r"`lm_head.weight` cannot be written as float16") as refused:
        export(stage, dtype="float16")
    assert "bfloat16" in (refused.value.hint or "") and left_in(stage) == []
