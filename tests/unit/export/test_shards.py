"""Files written tensor by tensor are what the library reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from picollm.errors import ConfigError
from picollm.export import shards

SHAPES = {"a": (3, 4), "scalar": (), "b": (5,), "c": (7, 2), "d": (100,)}


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", list(shards.TYPES))
def test_one_file(tmp_path: Path, dtype: str) -> None:
    seen: list[tuple[int, int]] = []
    sums = shards.write(
        tmp_path, shards.layout(SHAPES, dtype), values().items(), dtype, on_progress=lambda *at: seen.append(at)
    )
    (path,) = tmp_path.iterdir()
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} and path.name == "model.safetensors"
    found = load_file(path)
    assert found.keys() == SHAPES.keys()
    for name, tensor in values().items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype)))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    total = shards.num_bytes(SHAPES, dtype)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_several_files_and_their_index(tmp_path: Path) -> None:
    layout = shards.layout(SHAPES, "float32", max_bytes=60)
    assert [list(shard.shapes) for shard in layout] == [["a", "scalar"], ["b"], ["c"], ["d"]]  # d is larger than a file
    sums = shards.write(tmp_path, layout, values().items(), "float32")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": shards.num_bytes(SHAPES, "float32")}
    assert set(index["weight_map"].values()) == set(sums) and "model-00002-of-00004.safetensors" in sums
    for name, tensor in values().items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_values_in_pieces_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_VALUES_AT_ONCE", 3)
    shards.write(tmp_path, shards.layout(SHAPES, "bfloat16"), values().items(), "bfloat16")
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in values().items())


@pytest.mark.parametrize(("value", "word"), [(1e6, "beyond the range"), (float("nan"), "no number")])
def test_what_a_type_cannot_hold_is_refused(tmp_path: Path, value: float, word: str) -> None:
    shapes = {"big": (2,)}
    with pytest.raises(ConfigError, match="`big` cannot be written as float16") as refused:
        shards.write(tmp_path, shards.layout(shapes, "float16"), [("big", torch.tensor([1.0, value]))], "float16")
    assert word in (refused.value.cause or "")
