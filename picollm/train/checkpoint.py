"""Saving a training, going on from what was saved, and loading a model to use it.

Tensors are filed under parameter names, so a checkpoint says nothing of how many ranks wrote it, and any number can
read it. Every rank writes what it alone holds; rank 0 also writes the weights, and commits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from picollm.config.model import Architecture
from picollm.errors import ConfigError, IntegrityError, PicollmError
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.run_dir import StageDir
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_parts as parts
from picollm.train import checkpoint_tensors as tensors
from picollm.train import distributed
from picollm.train.checkpoint_saver import Saved, Saver

__all__ = ["LoadedModel", "Saved", "Saver", "load_model", "resume"]

# -- going on ---------------------------------------------------------------------------------------------------------


def resume(
    stage: StageDir, model: GPT, optimizer: MuonAdamW, *, tokenizer_sha256: str | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest intact checkpoint of a stage, written by any number of ranks. Every rank calls it.

    The ranks share the hashing and agree on each verdict, so that all go on from the same step although only one of
    them has seen the damage. Damaged checkpoints that were passed over are set aside.

    Args:
        tokenizer_sha256: of the tokenizer that the checkpoint must have been trained with.

    Returns:
        Its meta (None when the stage has none yet) and a warning for each damaged one that was passed over.

    Raises:
        IntegrityError: there are checkpoints and none is intact.
        ConfigError: it is of another architecture or tokenizer; both are named.
    """
    ranks = distributed.ranks()
    damaged: list[Path] = []
    warnings: list[str] = []
    last: PicollmError | None = None
    for step in reversed(json.loads(distributed.gather_texts(json.dumps(stage.finished_steps()))[0])):
        path = files.checkpoint_dir(stage, step)
        candidate = _Candidate(path, step, ranks, model, optimizer, tokenizer_sha256)
        problem = _agreed(candidate.check) or _agreed(candidate.load)
        if problem is None:
            if ranks.rank == 0 and damaged:
                for other in damaged:
                    files.set_aside(other)
                files.point_latest(stage, step)
            return candidate.meta, warnings
        if isinstance(problem, ConfigError):
            raise problem
        last = problem
        damaged.append(path)
        warnings.append(f"checkpoint of step {step} is damaged ({problem.message}); falling back to the one before")
    if last is not None:
        raise IntegrityError(
            f"no checkpoint of stage `{stage.name}` is intact",
            cause=last.message,
            hint=f"start the stage again with `picollm speedrun --run {stage.run.name} --force {stage.name}`",
        ) from last
    return None, warnings


@dataclass
class _Candidate:
    """A checkpoint that may be the one to go on from."""

    path: Path
    step: int
    ranks: distributed.Ranks
    model: GPT
    optimizer: MuonAdamW
    tokenizer_sha256: str | None

    def check(self) -> None:
        """Verify this rank's share of the bytes, and that all of it fits; changes nothing."""
        sums = files.verify(self.path, rank=self.ranks.rank, world=self.ranks.world)
        if parts.INDEX not in sums:
            raise IntegrityError(f"`{self.path / files.SUMS}` does not list `{parts.INDEX}`", hint=files.RESTORE)
        self.meta = files.read_meta(self.path)
        if self.meta["step"] != self.step:
            raise IntegrityError(
                f"`{self.path}` is not the checkpoint of its step",
                cause=f"`meta.json` says step {self.meta['step']}",
                hint=files.RESTORE,
            )
        if difference := _difference(tensors.architecture_of(self.path, self.meta), self.model.arch):
            raise ConfigError(
                f"checkpoint `{self.path}` is of another architecture",
                cause=difference,
                hint="start a new run with `--run NAME`",
            )
        tokenizer = self.meta.get("tokenizer_sha256")
        if self.tokenizer_sha256 is not None and tokenizer != self.tokenizer_sha256:
            raise ConfigError(
                f"checkpoint `{self.path}` was trained with another tokenizer",
                cause=f"its tokenizer's sha256 is {str(tokenizer)[:12]}…, the recipe names "
                f"{self.tokenizer_sha256[:12]}…",
                hint="put the tokenizer back, or start a new run with `--run NAME`",
            )
        self.index = parts.read_index(self.path)
        tensors.check_state(self.path, self.index, sums, self.optimizer.shards())

    def load(self) -> None:
        tensors.load_weights(self.model, self.path)
        with tensors.open_state(self.path, self.index) as read:
            self.optimizer.load(read)


def _difference(found: Architecture, wanted: Architecture) -> str:
    """The fields that differ, as `name` is X there and Y in the recipe; empty when none does."""
    ours = wanted.model_dump()
    return ", ".join(
        f"`{name}` is {value!r} there and {ours[name]!r} in the recipe"
        for name, value in found.model_dump().items()
        if value != ours[name]
    )


def _agreed(action: Callable[[], None]) -> IntegrityError | ConfigError | None:
    """Do something on every rank; what went wrong on any of them, the same on all. Damage outweighs a misfit."""
    told = ""
    try:
        action()
    except (IntegrityError, ConfigError) as error:
        told = json.dumps(error.to_dict())
    except OSError as error:
        told = json.dumps(IntegrityError("a file of it cannot be read", cause=str(error)).to_dict())
    problems = [json.loads(text) for text in distributed.gather_texts(told) if text]
    for kind in (IntegrityError, ConfigError):
        for problem in problems:
            if problem["type"] == kind.__name__:
                return kind(problem["message"], cause=problem["cause"], hint=problem["hint"])
    return None


# -- using a model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """A model for inference and where it came from."""

    model: GPT
    arch: Architecture
    step: int
    sha256: str
    tokenizer_sha256: str


def load_model(stage: StageDir, *, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """The stage's newest checkpoint as a model in eval mode, its weights cast to `dtype` once.

    Raises:
        MissingArtifact: the stage has no checkpoint.
        IntegrityError: it is damaged.
    """
    step = files.latest_step(stage)
    path = files.checkpoint_dir(stage, step)
    sums = files.verify(path, only=(tensors.WEIGHTS, "meta.json"))
    meta = files.read_meta(path)
    arch = tensors.architecture_of(path, meta)
    compute = getattr(torch, dtype)
    if not isinstance(tokenizer := meta.get("tokenizer_sha256"), str):
        raise IntegrityError(
            f"`{path / 'meta.json'}` is torn or was edited", cause="it names no tokenizer", hint=files.RESTORE
        )
    tensors.check_weights(path, arch)
    model = GPT(arch, compute_dtype=compute)
    tensors.load_weights(model, path)
    model = model.to(device=device, dtype=compute).eval().requires_grad_(False)
    return LoadedModel(model, arch, step, sums[tensors.WEIGHTS], tokenizer)
