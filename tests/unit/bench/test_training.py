"""Training measured on synthetic tokens: figures that add up, the same data every time, no trace in what is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from picollm.bench import training
from picollm.bench.training import measure, synthetic
from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.config.resolve import resolve
from picollm.errors import OutOfMemory
from picollm.hardware import detect
from picollm.plan import pretrain_recipe, train_runtime
from picollm.stages import bench_train

CPU = torch.device("cpu")
SETS = (
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.max_position_embeddings=16", "tokenizer.vocab_size=300", "train.batch_tokens=128",
    "train.device_batch_size=2", "train.threads=1", "train.dtype=float32",
)  # fmt: skip


def job(*sets: str, ranks: int = 1) -> tuple[TrainRecipe, TrainRuntime]:
    config = resolve(preset=None, config_path=None, sets=(*SETS, *sets)).config
    machine = detect()
    recipe = pretrain_recipe(config, machine, tokenizer_vocab=300, tokenizer_sha256="synthetic", data=())
    return recipe, train_runtime(config, machine, recipe, ranks=ranks)


def test_synthetic_batches_hold_this_ranks_share_of_a_step() -> None:
    recipe, runtime = job(ranks=2)
    batches = synthetic(recipe, runtime, 0, CPU)
    assert [tuple(inputs.shape) for inputs, _ in batches.micro_batches] == [(2, 16), (2, 16)]
    assert batches.count == 128  # tokens of all ranks: what the loss is divided by
    for inputs, targets in batches.micro_batches:
        assert torch.equal(inputs[:, 1:], targets[:, :-1]) and int(inputs.max()) < 300
    again, other = synthetic(recipe, runtime, 0, CPU), synthetic(recipe, runtime, 1, CPU)
    assert torch.equal(batches.micro_batches[0][0], again.micro_batches[0][0])
    assert not torch.equal(batches.micro_batches[0][0], other.micro_batches[0][0])


@pytest.mark.parametrize("sets", [(), ("model.arch=full",), ("train.dtype=float16",), ("train.z_loss=0.001",)])
def test_figures_of_a_cpu(sets: tuple[str, ...]) -> None:
    said: list[str] = []
    found = measure(*job(*sets), 0, CPU, steps=3, tell=said.append)
    assert said == ["first step…", "timing steps…", "timing parts of a step…"]
    assert found["step_s_min"] <= found["step_s"] <= found["step_s_max"]
    assert found["tokens_per_s"] == pytest.approx(128 / found["step_s"], rel=0.01)
    assert found["mfu"] is None and found["kernels"] is None  # a CPU has no data sheet
    assert all(value > 0 for value in found["parts_s"].values())
    first, last = found["loss"]
    assert first == pytest.approx(math.log(320), rel=0.05)  # the head starts at zero: all padded tokens alike
    assert last < first  # the same batch again and again


def test_compiling_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def tell(text: str) -> None:
        raise Stop(text)

    with pytest.raises(Stop, match="compiling…"):
        measure(*job("train.compile=true"), 0, CPU, steps=1, tell=tell)


def test_mfu_is_a_share_of_all_ranks_peak() -> None:
    assert training._share(3e12, 2e12, 2) == 0.75
    assert training._share(3e12, None, 2) is None


def folder_of(path: Path) -> Path:
    recipe, runtime = job()
    config: dict[str, Any] = {"recipe": recipe.model_dump(mode="json"), "runtime": runtime.model_dump(mode="json")}
    (path / "config.json").write_text(json.dumps(config | {"steps": 1}))
    return path


def test_the_worker_tells_that_memory_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: object, **more: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("picollm.bench.training.measure", no_memory)
    with pytest.raises(RuntimeError):
        bench_train.main(folder_of(tmp_path))
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert error["type"] == OutOfMemory.__name__ and "device_batch_size" in error["hint"]


def test_the_first_rank_to_fail_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder_of(tmp_path) / "result.json").write_text('{"error": {"message": "the culprit"}}')
    monkeypatch.setattr("picollm.bench.training.measure", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench_train.main(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["error"]["message"] == "the culprit"
