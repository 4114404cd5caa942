"""The optimizer on a GPU: the host waits for nothing, a skipped step leaves every bit, NCCL ranks follow one rank.

Run with `JAXTYPING_DISABLE=1`: the checks of shapes cannot be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW

WORKER = Path(__file__).parents[1] / "unit/optim/ranks_worker.py"
ARCH = Architecture(
    arch="portable", hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    intermediate_size=1024, vocab_size=512, max_position_embeddings=64, rope_theta=1e4,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.1)
SCHEDULE = Schedule(
    warmup_steps=0, warmdown_steps=2, final_lr_fraction=0.1, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip


def make(device: str, dtype: torch.dtype) -> tuple[GPT, MuonAdamW]:
    model = GPT(ARCH)
    model.init_weights(0)
    model.to(device)
    return model, MuonAdamW(model, RATES, SCHEDULE, 10, dtype=dtype)


def give_gradients(model: GPT, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def everything(model: GPT, optimizer: MuonAdamW) -> list[Tensor]:
    return [t.detach().cpu().clone() for t in (*model.parameters(), *(s.tensor for s in optimizer.shards()))]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_those_of_a_cpu_and_nobody_waits(compiled: bool) -> None:
    expected, expected_optimizer = make("cpu", torch.float32)
    model, optimizer = make("cuda", torch.float32)
    if compiled:
        optimizer.compile()
    keep, scale = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    for step in range(4):
        give_gradients(expected, step)
        expected_optimizer.step(step, keep=torch.ones(()))
        give_gradients(model, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles
        optimizer.grad_square()
        optimizer.step(step, keep=keep, grad_scale=scale)
        torch.cuda.set_sync_debug_mode("default")
    pairs = zip(everything(model, optimizer), everything(expected, expected_optimizer), strict=True)
    assert all((a - b).norm() <= 1e-3 * b.norm() for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_is_not_kept_leaves_every_bit(dtype: torch.dtype) -> None:
    model, optimizer = make("cuda", dtype)
    give_gradients(model, 0)
    optimizer.step(0, keep=torch.ones((), device="cuda"))
    before = everything(model, optimizer)
    give_gradients(model, 1)
    for p in model.parameters():
        p.grad.view(-1)[0] = torch.nan
    optimizer.step(1, keep=torch.isfinite(optimizer.grad_square()))
    after = everything(model, optimizer)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, after, strict=True))


@pytest.mark.multi_gpu
def test_two_nccl_ranks_follow_one(tmp_path: Path) -> None:
    """The jobs of tests/unit/optim/test_ranks.py over NCCL."""
    command = [sys.executable, WORKER, tmp_path, "2"]  # a wrong order of messages would wait for ever
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    def read(world: int, rank: int) -> dict[str, Any]:
        return torch.load(tmp_path / f"{world}-ranks-from-0-to-50-{rank}.pt", weights_only=True)

    alone, first, second = read(1, 0), read(2, 0), read(2, 1)
    for arch in ("portable", "full"):
        assert first[arch]["fingerprint"] == second[arch]["fingerprint"]
        for name, weight in alone[arch]["weights"].items():
            assert (first[arch]["weights"][name] - weight).abs().max() < 1e-8
    for rank in (first, second):  # NCCL works while the backward pass of compiled blocks does
        assert [count > 0 for count in rank["compiled"]["compiled"]["launched"]] == [False, True] * 2
    for run in ("float32", "bfloat16", "compiled"):
        assert first[run]["fingerprint"] == second[run]["fingerprint"]
    for run in ("float32", "bfloat16"):
        assert abs(first[run]["loss"] / alone["float32"]["loss"] - 1) < 0.005
