"""The estimate of peak memory against tensors that are really alive, and its parts."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from picollm import memory
from picollm.attention_choice import AttentionChoice
from picollm.config.resolve import resolve
from picollm.memory import optimizer_bytes, training_memory
from picollm.model import attention, loss
from picollm.model.gpt import GPT
from picollm.optim import buckets
from picollm.optim.optimizer import MuonAdamW
from picollm.rates import pretrain_horizon, pretrain_rates, pretrain_schedule
from picollm.scaling import architecture, num_params

SDPA = AttentionChoice("sdpa", "matmul", "")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made in it and are still there; exact, whatever the allocator does."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = tensor.untyped_storage().nbytes()
                self.now += self.alive[key]
                weakref.finalize(tensor.untyped_storage(), self.drop, key)
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize(
    ("sets", "dtype", "full", "checkpointing", "passes"),
    [
        (["model.depth=2"], "float32", "sdpa", False, 1),
        (["model.depth=3"], "bfloat16", "matmul", False, 1),
        (["model.depth=4", "model.arch=full"], "bfloat16", "matmul", False, 2),
        (["model.depth=4", "model.arch=full"], "float32", "sdpa", False, 1),
        (["model.depth=4"], "bfloat16", "sdpa", True, 1),
    ],
)
def test_estimate_is_the_peak_of_live_tensors(monkeypatch, sets, dtype, full, checkpointing, passes):
    monkeypatch.setattr(memory, "ALLOCATOR_FACTOR", {"cpu": 1.0})
    row, rows = 256, 4
    wanted = [f"model.max_position_embeddings={row}", "tokenizer.vocab_size=2048", "train.steps=9"]
    cfg = resolve(preset=None, sets=[*sets, *wanted], environ={"XDG_CONFIG_HOME": "/nonexistent"}).config
    arch, compute = architecture(cfg), getattr(torch, dtype)
    kernels = AttentionChoice(full, "matmul" if arch.sliding_window else None, "")
    rates = pretrain_rates(cfg, arch, pretrain_horizon(cfg, arch))
    ids = torch.randint(2048, (rows, row))
    with LiveBytes() as live:
        model = GPT(arch, compute_dtype=compute, backend=kernels.full, window_backend=kernels.window)
        model.init_weights(0)
        model.activation_checkpointing = checkpointing
        optimizer = MuonAdamW(model, rates, pretrain_schedule(9), 9, dtype=compute)
        live.peak = 0
        for _ in range(passes):
            model.loss(ids, ids, scale=1 / ids.numel()).backward()
        optimizer.step(0, keep=torch.ones(()))
        peak = live.peak
    found = training_memory(arch, dtype, rows, "cpu", kernels, passes=passes, checkpointing=checkpointing)
    assert found.total - found.base == pytest.approx(peak, rel=0.1)


def test_constants_are_those_of_the_model():
    assert memory.LOGITS_PER_CHUNK == loss.LOGITS_PER_CHUNK
    assert memory.GPU_MEMORY_SHARE == loss.GPU_MEMORY_SHARE
    assert memory.MATMUL_BLOCK == attention.MATMUL_BLOCK
    assert memory.STACK_ELEMENTS == buckets.STACK_ELEMENTS


def test_work_space_of_an_update_is_bounded(monkeypatch):
    arch = arch_of("model.depth=8", "tokenizer.vocab_size=512", "model.max_position_embeddings=256")
    cfg = resolve(preset=None, sets=["model.depth=8"], environ={"XDG_CONFIG_HOME": "/nonexistent"}).config
    rates = pretrain_rates(cfg, arch, pretrain_horizon(cfg, arch))
    matrix = 4 * arch.hidden_size**2
    found = {}
    for together in (8, 2):
        for module in (memory, buckets):
            monkeypatch.setattr(module, "STACK_ELEMENTS", together * matrix)
        with LiveBytes() as live:
            model = GPT(arch)
            model.init_weights(0)
            optimizer = MuonAdamW(model, rates, pretrain_schedule(9), 9, dtype=torch.float32)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            before = live.peak = live.now
            optimizer.step(0, keep=torch.ones(()))
        found[together] = live.peak - before
        estimate = training_memory(arch, "float32", 1, "cpu", SDPA).update
        assert estimate == pytest.approx(found[together], rel=0.25)
    assert found[2] == pytest.approx(found[8] / 4, rel=0.1)


def arch_of(*sets: str):
    return architecture(resolve(preset=None, sets=sets, environ={"XDG_CONFIG_HOME": "/nonexistent"}).config)


def test_every_holder_is_counted():
    arch = arch_of("model.depth=12")
    params = num_params(arch)
    one = training_memory(arch, "bfloat16", 4, "cuda", SDPA, gpu_bytes=80 * 2**30)
    eight = training_memory(arch, "bfloat16", 32, "cuda", SDPA, gpu_bytes=80 * 2**30)
    assert one.weights == one.gradients == 4 * params.total
    assert one.optimizer == 4 * params.matrices + 8 * (params.embedding + params.head + params.scalars)
    assert eight.activations == pytest.approx(8 * one.activations, rel=1e-6)
    assert one.compute_copy == 2 * params.matrices
    again = training_memory(arch, "bfloat16", 32, "cuda", SDPA, checkpointing=True, gpu_bytes=80 * 2**30)
    assert again.activations < eight.activations / 5 and again.block > eight.block
    fp8 = training_memory(arch, "bfloat16", 32, "cuda", SDPA, fp8=True, gpu_bytes=80 * 2**30)
    assert fp8.weights == eight.weights + 2 * params.matrices and fp8.compute_copy == 0
    assert fp8.activations > eight.activations
    double = training_memory(arch, "float64", 4, "cpu", SDPA)
    assert (double.weights, double.optimizer) == (8 * params.total, 2 * one.optimizer)


def test_activations_of_a_gpu_are_those_that_were_counted():
    """GPU.md 1.2: 31 C bytes a layer and token once relu^2 keeps its output alone."""
    arch = arch_of("model.depth=24")
    found = training_memory(arch, "bfloat16", 8, "cuda", SDPA, gpu_bytes=80 * 2**30)
    assert found.activations / (8 * 2048 * 24 * 1536) == pytest.approx(31, rel=0.06)


def test_ranks_share_the_optimizers_state():
    arch = arch_of("model.depth=24", "model.arch=full")
    params = num_params(arch)
    alone, shared = optimizer_bytes(params), optimizer_bytes(params, 8, 4 * 1536 * 1536)
    assert alone == 4 * (params.matrices + params.gates) + 8 * (
        params.embedding + params.head + params.value_embeddings + params.scalars
    )
    assert alone / 8 <= shared < alone / 8 * 1.05
    one = training_memory(arch, "bfloat16", 8, "cuda", SDPA, gpu_bytes=80 * 2**30)
    many = training_memory(arch, "bfloat16", 8, "cuda", SDPA, ranks=8, gpu_bytes=80 * 2**30)
    assert many.optimizer == shared and many.gradients == one.gradients and many.total < one.total


def test_copies_are_as_large_as_what_is_saved_beside_training():
    arch = arch_of("model.depth=4", "model.arch=full", "tokenizer.vocab_size=2048")
    cfg = resolve(preset=None, sets=["model.depth=4"], environ={"XDG_CONFIG_HOME": "/nonexistent"}).config
    model = GPT(arch)
    optimizer = MuonAdamW(model, pretrain_rates(cfg, arch, pretrain_horizon(cfg, arch)), pretrain_schedule(9), 9,
                          dtype=torch.float32)  # fmt: skip
    saved = [*model.parameters(), *(shard.tensor for shard in optimizer.shards())]
    copied = sum(tensor.nbytes for tensor in saved)
    assert memory.copies_bytes(arch, "bfloat16") == pytest.approx(copied, rel=0.02)  # but for NorMuon's variances
    weights = 4 * num_params(arch).total
    state = memory.copies_bytes(arch, "float32", ranks=8) - weights
    assert memory.copies_bytes(arch, "float32", ranks=8, ranks_per_node=4) == weights + 4 * state
    assert memory.copies_bytes(arch, "float64") == 2 * memory.copies_bytes(arch, "bfloat16")
    assert memory.copies_fit(copied, 2 * copied) and not memory.copies_fit(copied, 2 * copied - 2)


def test_accumulating_keeps_gradients_beside_activations():
    arch = arch_of("model.depth=6")
    once = training_memory(arch, "float32", 8, "cpu", SDPA)
    twice = training_memory(arch, "float32", 8, "cpu", SDPA, passes=2)
    assert twice.total - once.total == once.gradients
