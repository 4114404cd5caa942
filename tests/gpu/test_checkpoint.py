"""A GPU's state is copied as it was when `save` was called, although its kernels and ours run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.run_dir import run_named
from picollm.train import checkpoint, checkpoint_tensors
from picollm.train.checkpoint_files import read_sums

pytestmark = pytest.mark.gpu
ARCH = Architecture(
    arch="portable", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    intermediate_size=2048, vocab_size=4096, max_position_embeddings=128, rope_theta=1e5,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.1)
SCHEDULE = Schedule(
    warmup_steps=0, warmdown_steps=5, final_lr_fraction=0.05, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip


def make() -> tuple[GPT, MuonAdamW]:
    model = GPT(ARCH, compute_dtype=torch.bfloat16)
    model.init_weights(0)
    model.cuda()
    return model, MuonAdamW(model, RATES, SCHEDULE, 20, dtype=torch.bfloat16)


def test_training_goes_on_while_its_state_is_written(clean_environment: Path) -> None:
    model, optimizer = make()
    keep = torch.ones((), device="cuda")

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            ids = torch.randint(0, 4096, (16, 129), device="cuda")
            model.loss(ids[:, :-1], ids[:, 1:], scale=1 / 2048).backward()
            optimizer.step(step, keep=keep)

    beside, waiting = (
        checkpoint.Saver(run_named(name).stage("pretrain"), 0, 1, keep_last=9, asynchronous=name == "beside")
        for name in ("beside", "waiting")
    )
    for first in (0, 5):  # the second time the pinned buffers are there
        steps(first, first + 5)  # still in the queue when the copies are asked for
        beside.save(first + 5, model, optimizer, {})
        waiting.save(first + 5, model, optimizer, {})
        steps(first, first + 5)
        beside.wait()
        [one], [other] = beside.finished(), waiting.finished()
        assert read_sums(one.path) == read_sums(other.path)
    assert all(buffer.is_pinned() for buffers in beside._buffers for buffer in buffers.values())
    meta, warnings = checkpoint.resume(beside.stage, model, optimizer)
    assert meta is not None and meta["step"] == 10 and warnings == []
    waiting.save(11, model, optimizer, {})
    sums, wanted = read_sums(waiting.finished()[0].path), read_sums(one.path)
    assert {name: sums[name] for name in sums if name != "meta.json"} == {
        name: wanted[name] for name in wanted if name != "meta.json"
    }


def test_without_room_for_copies_it_is_written_from_the_gpu(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make()
    stage, warnings = run_named("r").stage("pretrain"), []
    saver = checkpoint.Saver(stage, 0, 1, keep_last=9, asynchronous=True, warn=warnings.append)
    saver.save(1, model, optimizer, {})
    saver.wait()

    def no_room(named: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.empty(1 << 20, pin_memory=True)  # what was pinned before it failed
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(checkpoint_tensors, "host_buffers", no_room)
    again = checkpoint.Saver(stage, 0, 1, keep_last=9, asynchronous=True, warn=warnings.append)
    again.save(2, model, optimizer, {})
    [one], [other] = saver.finished(), again.finished()
    sums, wanted = read_sums(other.path), read_sums(one.path)
    assert not again.asynchronous and len(warnings) == 1
    assert {name for name in sums if sums[name] != wanted[name]} == {"meta.json"}
