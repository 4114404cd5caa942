"""The GGUF file itself: what is in it, how it is written, and what happens when it cannot be. No runtime needed."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf as library
import pytest
import torch

from picollm.config.model import Architecture
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.export import folding, gguf, gguf_export, gguf_file, gguf_table, listing, llamacpp_checks, parity
from picollm.export.gguf_export import GGUFRequest, default_path, export_gguf, modelfile_path
from picollm.export.gguf_types import DIRECT, HOSTS, QUANTS, find_host, find_quant
from picollm.export.llamacpp_file import describe
from picollm.export.parity import report_path
from picollm.export.provenance import provenance_of
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir
from picollm.tokenizer.special import ASSISTANT_END, BOS, SPECIALS

from .conftest import randomise

Small = Callable[..., Architecture]
Made = Callable[..., StageDir]


@pytest.fixture(autouse=True)
def without_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What llama.cpp says is `test_llamacpp.py`'s business."""
    monkeypatch.setattr(llamacpp_checks, "version", lambda: None)


@pytest.fixture
def stage(make_stage: Made, small: Small) -> StageDir:
    return make_stage(randomise(GPT(small())))


def request(stage: StageDir, quant: str = "F32", host: str = "apertus", **options: object) -> GGUFRequest:
    found = find_quant(quant)
    return GGUFRequest(stage, found, host, default_path(stage, found, host), **options)  # type: ignore[arg-type]


def left(stage: StageDir) -> list[str]:
    folder = gguf_export.gguf_folder(stage.run)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# -- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("quant", list(DIRECT))
def test_every_type_reads_back(stage: StageDir, quant: str, host: str) -> None:
    asked = request(stage, quant, host)
    report = export_gguf(asked)
    assert report["ok"] and report["bytes"] == asked.out.stat().st_size
    ran = {row["name"]: row["passed"] for row in report["checks"] if row["passed"] is not None}
    assert ran == {"tensors": True, "tensor values, largest relative error": True, "keys": True}
    types = {tensor.name: tensor.tensor_type.name for tensor in library.GGUFReader(asked.out).tensors}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == quant
    assert types["blk.1.attn_norm.weight"] == types["blk.1.attn_q_norm.weight"] == "F32"
    assert ("blk.0.ffn_gate.weight" in types) == (host == "qwen3")
    assert json.loads(report_path(asked.out).read_text()) == report


def test_keys_of_a_chat_model(stage: StageDir) -> None:
    asked = request(stage, license="apache-2.0")
    export_gguf(asked)
    found = {name: field.contents() for name, field in library.GGUFReader(asked.out).fields.items()}
    size = found["apertus.vocab_size"]
    assert found["general.architecture"] == "apertus" and found["general.license"] == "apache-2.0"
    assert found["general.name"] == "test-sft" and found["general.tags"][-1] == "picollm"
    assert found["general.dataset.0.name"] == "toy-world" and found["general.dataset.0.version"] == "ab" * 32
    assert found["picollm.training_tokens"] == 10 * 1024 and found["picollm.step"] == 10
    checkpoint = folding.open_checkpoint(stage)
    assert found["picollm.checkpoint_sha256"] == checkpoint.sha256
    assert found["picollm.recipe_sha256"] == checkpoint.meta["recipe_sha256"]
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == size and tuple(tokens[-len(SPECIALS) :]) == SPECIALS
    assert [tokens[found[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "eot", "eom")] == [
        BOS, ASSISTANT_END, ASSISTANT_END, BOS,
    ]  # fmt: skip
    assert found["tokenizer.ggml.token_type"] == [1] * (size - 9) + [3] * 9
    assert found["tokenizer.ggml.pre"] == "qwen2" and found["tokenizer.ggml.add_bos_token"] is True
    assert "bos_token" in found["tokenizer.chat_template"]
    assert found["xielu.alpha_p"] == pytest.approx([0.541324854] * 2) and found["xielu.alpha_n"] == [-128.0] * 2


def test_keys_of_a_base_model(make_stage: Made, small: Small) -> None:
    asked = request(make_stage(randomise(GPT(small())), name="pretrain"), host="qwen3")
    export_gguf(asked)
    found = {name: field.contents() for name, field in library.GGUFReader(asked.out).fields.items()}
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.bos_token_id"]
    missing = ("tokenizer.chat_template", "tokenizer.ggml.eot_token_id", "general.license", "xielu.beta")
    assert not [name for name in missing if name in found]
    text = modelfile_path(asked.out).read_text()
    assert "{{ .Prompt }}" in text and f'stop "{BOS}"' in text and ASSISTANT_END not in text


def test_a_modelfile_of_the_user_is_kept(stage: StageDir) -> None:
    asked = request(stage)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    modelfile_path(asked.out).write_text("FROM mine")
    with pytest.raises(ConfigError, match=r"Modelfile` exists"):
        export_gguf(asked)
    assert modelfile_path(asked.out).read_text() == "FROM mine" and not asked.out.exists()


def test_rows_that_fit_no_block_stay_f16(make_stage: Made, small: Small) -> None:
    asked = request(make_stage(randomise(GPT(small(hidden_size=80)))), "Q8_0")
    report = export_gguf(asked)
    types = {tensor.name: tensor.tensor_type.name for tensor in library.GGUFReader(asked.out).tensors}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q8_0"
    assert set(report["kept_float"]) == {name for name, kind in types.items() if kind == "F16"}


def test_the_gate_is_steep_where_the_type_can_hold_it(stage: StageDir) -> None:
    checkpoint = folding.open_checkpoint(stage)
    weight = dict(gguf.tensors(checkpoint, "apertus", find_quant("F32")))["blk.0.ffn_up.weight"]
    for quant, c in (("F32", 1024.0), ("BF16", 1024.0), ("F16", 64.0), ("Q4_0", 64.0)):
        found = dict(gguf.tensors(checkpoint, "qwen3", find_quant(quant)))
        assert torch.equal(found["blk.0.ffn_gate.weight"], c * weight)


# -- what is noticed --------------------------------------------------------------------------------------------------


def test_another_tensor_or_key_is_noticed(stage: StageDir) -> None:
    asked = request(stage, "Q8_0")
    export_gguf(asked)
    checkpoint, quant = folding.open_checkpoint(stage), find_quant("Q8_0")
    tokenizer = folding.open_tokenizer(checkpoint)
    provenance = replace(provenance_of(checkpoint, None), num_params=1, checkpoint_sha256="", tokenizer_sha256="")
    metadata, listed = gguf.table(checkpoint, tokenizer, "apertus", quant, provenance)
    stored = gguf_file.read(asked.out)
    wrong = gguf_file.wrong_keys(stored.keys, "apertus", quant, metadata)
    assert [line.split("`")[1] for line in wrong] == [
        "general.size_label",
        "picollm.checkpoint_sha256",
        "picollm.tokenizer_sha256",
    ]
    scaled = ((name, tensor * 1.05) for name, tensor in gguf.tensors(checkpoint, "apertus", quant))
    error, differing = gguf_file.tensor_errors(asked.out, stored.tensors, quant, listed, scaled)
    assert not differing and error > quant.max_error
    less = [entry for entry in listed if "attn_v" not in entry.name]
    wanted = [(name, t) for name, t in gguf.tensors(checkpoint, "apertus", quant) if "attn_v" not in name]
    _, differing = gguf_file.tensor_errors(asked.out, stored.tensors, quant, less, wanted)
    assert len(differing) == 2 and "not in the table" in differing[0]


def test_a_wrong_file_is_left_as_failed(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(stage)
    real = library.quantize
    monkeypatch.setattr(library, "quantize", lambda data, kind: real(data * 1.01, kind))
    shown: list[object] = []
    with pytest.raises(IntegrityError) as refused:
        export_gguf(asked, on_checks=shown.extend)
    assert "tensor values" in str(refused.value.cause) and ".failed" in str(refused.value.hint)
    assert left(stage) == [f"{asked.out.name}.failed", f"{asked.out.name}.failed.export.json"]
    assert any(getattr(row, "passed", None) is False for row in shown)


# -- what stands in the way -------------------------------------------------------------------------------------------


def test_names_of_types_and_architectures() -> None:
    assert find_quant("q8_0").name == "Q8_0" and find_host("qwen3") == "qwen3"
    with pytest.raises(ConfigError) as refused:
        find_quant("Q8_1")
    assert "Q8_0" in str(refused.value.hint)
    with pytest.raises(ConfigError):
        find_host("llama")


def test_features_that_do_not_fold(make_stage: Made, small: Small) -> None:
    stage = make_stage(randomise(GPT(small("full"))))
    with pytest.raises(ConfigError) as refused:
        export_gguf(request(stage))
    for key in ("model.window_pattern", "model.logit_softcap", "model.smear"):
        assert key in str(refused.value.cause)
    assert left(stage) == []


def test_a_tokenizer_that_gguf_does_not_know(stage: StageDir) -> None:
    """The cure is another tokenizer, not another architecture."""
    with pytest.raises(ConfigError) as refused:
        gguf_export.refuse_blocked(folding.open_checkpoint(stage), digits=2)
    assert "tokens of 2 digits" in str(refused.value.cause)
    assert "tokenizer.digits=1" in str(refused.value.hint) and "model.arch" not in str(refused.value.hint)


@pytest.mark.parametrize(
    ("value", "quant", "why"), [(float("nan"), "Q8_0", "no number"), (-float("inf"), "F32", "no number"),
    (1e5, "F16", "beyond the range")],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_weights_that_no_file_can_hold(make_stage: Made, small: Small, value: float, quant: str, why: str) -> None:
    model = randomise(GPT(small()))
    model.layers[1].mlp.up_proj.weight[3, 5] = value
    stage = make_stage(model)
    with pytest.raises(ConfigError, match=r"blk.1.ffn_up") as refused:
        export_gguf(request(stage, quant))
    assert why in str(refused.value.cause) and left(stage) == []


@pytest.mark.parametrize("name", ["", "mit\ntags: [x]", "mit: x", "- mit"])
def test_a_licence_is_a_name(stage: StageDir, name: str) -> None:
    """It would stand in the YAML of a model card."""
    with pytest.raises(ConfigError, match="names no licence"):
        export_gguf(request(stage, license=name))
    assert left(stage) == []
    export_gguf(request(stage, license="Apache-2.0 OR MIT"))


def test_a_stage_without_checkpoint_and_a_damaged_one(stage: StageDir) -> None:
    with pytest.raises(MissingArtifact):
        export_gguf(request(stage.run.stage("rl")))
    weights = next(stage.checkpoints.glob("*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError):
        export_gguf(request(stage))
    assert left(stage) == []


def test_an_earlier_export_is_replaced_only_when_told(stage: StageDir) -> None:
    asked = request(stage)
    first = export_gguf(asked)
    with pytest.raises(ConfigError) as refused:
        export_gguf(asked)
    assert "--force" in str(refused.value.hint)
    assert export_gguf(request(stage, force=True))["sha256"] == first["sha256"]
    report_path(asked.out).unlink()  # now it could be anybody's
    with pytest.raises(ConfigError):
        export_gguf(request(stage, force=True))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may become longer: what a full disk is like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fails_while_writing(stage: StageDir) -> None:
    with file_size_limit(100_000), pytest.raises(HostError) as refused:
        export_gguf(request(stage))
    assert "cannot write" in refused.value.message and left(stage) == []


def test_a_disk_without_room(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(HostError) as refused:
        export_gguf(request(stage))
    assert "1,000 are free" in str(refused.value.cause) and left(stage) == []


def test_an_interrupted_export_leaves_nothing(stage: StageDir) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(request(stage), on_progress=stop)
    assert left(stage) == []


def test_what_a_killed_export_left_is_swept(stage: StageDir) -> None:
    asked = request(stage)
    asked.out.parent.mkdir(parents=True)
    gone, alive = (asked.out.with_name(f".{asked.out.name}.{pid}.tmp") for pid in (2**22 + 1, os.getppid()))
    gone.write_bytes(b"half")
    alive.write_bytes(b"half")
    export_gguf(asked)
    assert not gone.exists() and alive.exists()


def test_files_that_describe_no_model(stage: StageDir) -> None:
    """Foreign ones: text that is no UTF-8, and a context without room for a token."""
    asked = request(stage)
    export_gguf(asked)
    good = asked.out.read_bytes()
    assert describe(asked.out).context == 512
    context = b"apertus.context_length" + (4).to_bytes(4, "little") + (512).to_bytes(4, "little")
    assert good.count(b"test-sft") and good.count(context) == 1
    for bad, why in (
        (good.replace(b"test-sft", b"\xff" * 8), "cannot be read as GGUF"),
        (good.replace(context, context[:-4] + bytes(4)), "is not a language model"),
    ):
        asked.out.write_bytes(bad)
        with pytest.raises(IntegrityError, match=why):
            describe(asked.out)


# -- llama-quantize ---------------------------------------------------------------------------------------------------


def test_k_quants_need_a_program(stage: StageDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not QUANTS["Q4_K_M"].direct and QUANTS["Q4_K_M"].block == 256
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError) as refused:
        export_gguf(request(stage, "Q4_K_M"))
    assert "PATH" in str(refused.value.hint) and left(stage) == []


@pytest.mark.parametrize(
    ("changes", "rows", "instead"), [({}, "64, 128", "Q4_1"), ({"hidden_size": 72, "head_dim": 18}, "72, 128", "Q4_1"),
    ({"hidden_size": 40, "head_dim": 10, "intermediate_size": 90}, "40, 90", "F16")],
)  # fmt: skip
def test_a_model_too_narrow_for_k_quants_hears_that_first(
    make_stage: Made, small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, int],
    rows: str, instead: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    stage = make_stage(randomise(GPT(small(**{"intermediate_size": 128, **changes}))))
    with pytest.raises(ConfigError) as refused:
        export_gguf(request(stage, "Q4_K_M"))
    assert "multiples of 256" in str(refused.value.cause) and f" {rows} weights" in str(refused.value.cause)
    assert refused.value.hint == f"choose `--quant {instead}`" and left(stage) == []


def test_what_the_program_makes_is_checked_and_what_it_says_is_told(
    stage: StageDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "llama-quantize"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def become(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    become('echo "quantizing $3"; echo "needs an importance matrix" >&2; exit 1')
    with pytest.raises(HostError) as refused:
        export_gguf(request(stage, "Q4_K_M"))
    assert "importance matrix" in str(refused.value.cause) and left(stage) == []
    become('cp "$1" "$2"')  # the file it was given: all floats, and not called Q4_K_M
    with pytest.raises(IntegrityError) as wrong:
        export_gguf(request(stage, "Q4_K_M"))
    assert "keys" in str(wrong.value.cause)
    assert [name for name in left(stage) if name.endswith(".tmp")] == []


def test_one_name_for_reports() -> None:
    assert listing.REPORT == parity.REPORT  # the first knows no torch


def test_names_of_tensors() -> None:
    assert gguf_table.tensor_name("layers.11.o") == "blk.11.attn_output.weight"
    assert gguf_table.tensor_name("output") == "output.weight"
