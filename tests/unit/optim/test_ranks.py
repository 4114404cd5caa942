"""Any number of ranks is one optimizer: 2 and 4 gloo ranks against 1, and state that goes 4 -> 3 -> 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("ranks_worker.py")
STEPS = 50

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank ended with after the last step, by how it came there; all jobs in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", WORKER, folder, "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    def read(name: str, world: int) -> list[dict[str, Any]]:
        return [torch.load(folder / f"{name}-to-50-{rank}.pt", weights_only=True) for rank in range(world)]

    found = {str(world): read(f"{world}-ranks-from-0", world) for world in (1, 2, 4)}
    return found | {"4 -> 3 -> 1": read("1-ranks-from-30", 1)}


def difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == reference.keys()
    return max((ours[name] - reference[name]).abs().max().item() for name in reference)


@pytest.mark.parametrize(("ranks", "arch"), [("2", "portable"), ("2", "full"), ("4", "full"), ("4 -> 3 -> 1", "full")])
def test_ranks_follow_one_in_float64(results: Results, ranks: str, arch: str) -> None:
    [alone], ours = results["1"], results[ranks][0]
    assert difference(ours[arch]["weights"], alone[arch]["weights"]) < 1e-8
    steps = list(zip(ours[arch]["losses"], alone[arch]["losses"][-len(ours[arch]["losses"]) :], strict=True))
    assert max(abs(a - b) for pair in steps for a, b in zip(*pair, strict=True)) < 1e-8  # losses and gradient norms
    assert alone[arch]["losses"][-1][0] < 0.6 * alone[arch]["losses"][0][0]  # and it is training


def test_what_happens_seldom_ends_alike(results: Results) -> None:
    """A skipped step, dropped gradients, and one where few parameters take part and nothing was announced."""
    [alone] = results["1"]
    for ranks in ("2", "4"):
        assert difference(results[ranks][0]["full"]["after"], alone["full"]["after"]) < 1e-8


@pytest.mark.parametrize("ranks", ["2", "4"])
def test_all_ranks_hold_the_same_weights(results: Results, ranks: str) -> None:
    for run in results[ranks][0]:
        assert len({rank[run]["fingerprint"] for rank in results[ranks]}) == 1


@pytest.mark.parametrize(("ranks", "run"), [("2", "float32"), ("4", "float32"), ("2", "bfloat16")])
def test_float32_and_a_bfloat16_wire_reach_the_same_loss(results: Results, ranks: str, run: str) -> None:
    assert abs(results[ranks][0][run]["loss"] / results["1"][0]["float32"]["loss"] - 1) < 0.005


def test_reductions_run_beside_the_backward_pass_of_compiled_blocks(results: Results) -> None:
    for rank in results["2"]:
        plain, compiled = rank["compiled"]["plain"], rank["compiled"]["compiled"]
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        for found in (plain, compiled):  # of the two micro-batches of a step the first reduces nothing
            assert [count > 0 for count in found["launched"]] == [False, True] * 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_its_share_of_the_state(results: Results, ranks: int) -> None:
    def elements(result: dict[str, Any]) -> int:
        return sum(tensor.numel() for tensor, *_ in result["full"]["state"].values())

    whole = elements(results["1"][0])
    parts = [elements(result) for result in results[str(ranks)]]
    slot = 1.1 * 128 * 32  # so few layers leave some ranks a matrix more than others; the 10 % are second moments
    assert sum(parts) == whole and max(parts) < whole / ranks + slot
