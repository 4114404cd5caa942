"""The toy world's datasets: made once, the same bytes everywhere, and made again when they are not as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from picollm.data import toy_datasets, toy_world
from picollm.data.datasets import Dataset
from picollm.data.registry import TOY_NAMES
from picollm.data.toy_datasets import ensure, ensure_toy_world


def small_toy_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_datasets, "TOY_SIZES", dict.fromkeys(TOY_NAMES, (300, 40)))
    monkeypatch.setattr(toy_datasets, "TOY_FINGERPRINT_ROWS", 20)


def test_toy_world_is_made_once_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_toy_world(monkeypatch)
    ensure_toy_world()
    ensure_toy_world(tmp_path / "other")
    first = {name: Dataset.open(name) for name in TOY_NAMES}
    assert [dataset.kind for dataset in first.values()] == ["text", "conversations"]
    for name, dataset in first.items():
        assert dataset.sha256 == Dataset.open(name, tmp_path / "other").sha256
        assert (dataset.rows("train"), dataset.rows("validation")) == (300, 40)
    assert list(first["toy-world"].documents("train")) == list(toy_world.documents(300, toy_datasets.TOY_SEED))

    def refuse(*_: object) -> None:
        raise AssertionError("an intact toy world was written again")

    monkeypatch.setattr(toy_datasets, "DatasetWriter", refuse)
    ensure_toy_world()


@pytest.mark.parametrize("damaged", ["dataset.json", "train-00000.jsonl"])
def test_a_damaged_toy_world_is_made_again(monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    small_toy_world(monkeypatch)
    good = ensure("toy-world-chat")
    os.truncate(good.path / damaged, 10)
    again = ensure("toy-world-chat")
    assert again.sha256 == good.sha256
    assert again.verify() == []
    assert list((good.path.parent / ".old").iterdir()) == []


def test_another_generator_makes_another_toy_world(monkeypatch: pytest.MonkeyPatch) -> None:
    small_toy_world(monkeypatch)
    before = ensure("toy-world")
    monkeypatch.setattr(toy_world, "documents", lambda num, seed: (f"story {index}" for index in range(num)))
    after = ensure("toy-world")
    assert after.sha256 != before.sha256
    assert after.documents("train")[7] == "story 7"


def test_two_processes_at_once_make_one_toy_world(clean_environment: Path) -> None:
    command = [sys.executable, "-c", "from picollm.data.toy_datasets import ensure_toy_world; ensure_toy_world()"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    for name, train in zip(TOY_NAMES, (8_000, 12_000), strict=True):
        dataset = Dataset.open(name)
        assert dataset.rows("train") == train
        assert dataset.verify() == []
    visible = {path.name for path in (clean_environment / "datasets").iterdir() if not path.name.startswith(".")}
    assert visible == set(TOY_NAMES)


def test_a_toy_world_that_a_run_was_prepared_with_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    small_toy_world(monkeypatch)
    ensure_toy_world()
    used = {name: Dataset.open(name).sha256 for name in TOY_NAMES}
    monkeypatch.setattr(toy_datasets, "TOY_SEED", toy_datasets.TOY_SEED + 7)  # what another generator would do
    assert ensure("toy-world", keep=used.values()).sha256 == used["toy-world"]
    # Its shards are still looked at, and a run of its own gets what this version generates.
    assert ensure("toy-world-chat").sha256 != used["toy-world-chat"]
    assert Dataset.open("toy-world").sha256 != used["toy-world"]
