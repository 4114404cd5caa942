"""Any number of ranks measures the same: gloo ranks against one, with whole, uneven and empty shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picollm.tokenizer.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("ranks_worker.py")

Read = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Read:
    """What each rank found in a job on so many ranks; all jobs in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tokenizer.json").write_bytes(tokenizer.json)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, WORKER, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    def read(job: str, world: int) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{job}-{world}-*.json"))]

    return read


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_finds_what_one_finds_to_the_last_bit(read: Read, world: int) -> None:
    [alone], ranks = read("figures", 1), read("figures", world)
    assert len(ranks) == world
    for rank in ranks:
        for name, figures in rank.items():
            expected = alone[name]
            assert {**figures, "seen": None} == {**expected, "seen": None}, name


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_report_equally_often_and_less_often_than_one(read: Read, world: int) -> None:
    [alone], ranks = read("figures", 1), read("figures", world)
    for name, figures in ranks[0].items():
        seen, of_one = figures["seen"], alone[name]["seen"]
        assert all(rank[name]["seen"] == seen for rank in ranks), name
        assert seen == sorted(seen) and seen[-1:] == of_one[-1:], name
    assert len(ranks[0]["many"]["seen"]) < 0.7 * len(alone["many"]["seen"])
    assert len(ranks[0]["one"]["seen"]) == len(alone["one talk"]["seen"]) == 1


def test_figures_are_of_something(read: Read) -> None:
    [alone] = read("figures", 1)
    assert alone["many"]["documents"] == 15 and alone["many"]["bpb"] > 1 and alone["many"]["stderr"] > 0
    assert alone["many"]["bpb"] == pytest.approx(alone["default"]["bpb"], rel=1e-6)
    assert alone["talks"]["rows"] > 8 and alone["talks"]["loss"] > 1
    assert alone["none"] == {"loss": None, "rows": 0, "seen": []}


def test_one_rank_that_shall_stop_stops_all_in_the_same_round(read: Read) -> None:
    ranks = read("stopped", 3)
    assert [rank["looks"] for rank in ranks] == [3, 3, 3]
    assert all("stopped while it evaluated" in rank["error"] for rank in ranks)
    phases = ranks[0]["phases"]
    assert phases[0] == "evaluating…" and len(phases) == 3 and phases[-1].endswith("% done…")


def test_nobody_waits_for_a_rank_that_died(read: Read) -> None:
    [survivor] = read("failing", 2)
    assert "by peer" in survivor["error"]
