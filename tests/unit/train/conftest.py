"""A model of a few thousand weights with its optimizer, as one rank of any number sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.run_dir import StageDir, run_named

SMALL = Architecture(
    arch="portable", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, vocab_size=40, max_position_embeddings=8, rope_theta=1e5,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.1)
SCHEDULE = Schedule(
    warmup_steps=1, warmdown_steps=5, final_lr_fraction=0.05, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip


@dataclass(frozen=True)
class Alone:
    """A rank's place without its peers: decides what it owns, exchanges nothing."""

    rank: int
    world: int

    def _no_peers(self, *tensors: Tensor) -> None:
        raise AssertionError("there is nobody to exchange with")

    reduce_scatter = all_gather = all_reduce = _no_peers


@dataclass
class Training:
    """A model and its optimizer."""

    model: GPT
    optimizer: MuonAdamW

    def advance(self, step: int) -> None:
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
        self.model.loss(ids[:, :-1], ids[:, 1:], scale=1 / 16).backward()
        self.optimizer.step(step, keep=torch.ones(()))

    def everything(self) -> dict[str, Tensor]:
        """Weights and this rank's state by name, copied."""
        state = {f"{shard.name} {shard.rows}": shard.tensor for shard in self.optimizer.shards()}
        return {name: tensor.detach().clone() for name, tensor in [*self.model.named_parameters(), *state.items()]}


Make = Callable[..., Training]


@pytest.fixture
def make() -> Make:
    """A new training with the same first weights each time."""

    def make(arch: Architecture = SMALL, rank: int = 0, world: int = 1) -> Training:
        model = GPT(arch)
        model.init_weights(0)
        ranks = Alone(rank, world) if world > 1 else None
        return Training(model, MuonAdamW(model, RATES, SCHEDULE, 10, dtype=torch.float32, ranks=ranks))  # type: ignore[arg-type]

    return make


@pytest.fixture
def stage(clean_environment: Path) -> StageDir:
    stage = run_named("test").stage("pretrain")
    stage.path.mkdir(parents=True)
    return stage


@pytest.fixture
def recipe_of_small() -> list[dict[str, Any]]:
    """Architecture, rates and schedule of what `make` makes, as JSON for another process."""
    return [section.model_dump(mode="json") for section in (SMALL, RATES, SCHEDULE)]
