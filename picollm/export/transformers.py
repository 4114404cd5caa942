"""`picollm export transformers`, from a stage to a checked folder: everything but talking to the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.config.model import Architecture
from picollm.errors import ConfigError
from picollm.export import features, folding, parity, shards, transformers_check, transformers_files
from picollm.export.parity import Check
from picollm.export.provenance import provenance_of
from picollm.export.transformers_files import ARCHES, QWEN3, REMOTE
from picollm.export.transformers_tensors import table, tensors
from picollm.export.unready import require_room, unready
from picollm.files import disk_errors
from picollm.run_dir import RunDir, StageDir
from picollm.train import checkpoint_files
from picollm.train.checkpoint_tensors import architecture_of

# phase, done, total
Progress = Callable[[str, int, int], None]
OnChecks = Callable[[list[Check]], None]

# What the files beside the weights take, a tokenizer of 64 K tokens included.
_SMALL_FILES_BYTES = 16 << 20


@dataclass(frozen=True)
class TransformersRequest:
    """What is asked for.

    Attributes:
        host: class that the folder names: `qwen3`, `apertus`, or `picollm`, whose code goes with it. None takes
            `qwen3` where the model folds into it, else `picollm`.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        license: of the weights; left open unless given.
        shard_bytes: largest file of weights.
    """

    stage: StageDir
    host: str | None = None
    dtype: str = "float32"
    out: Path | None = None
    force: bool = False
    license: str | None = None
    shard_bytes: int = shards.SHARD_BYTES


def transformers_folder(run: RunDir) -> Path:
    return run.path / "export" / "transformers"


def default_path(stage: StageDir, dtype: str, host: str) -> Path:
    """`RUN/export/transformers/RUN-STAGE-DTYPE`, with the architecture in it where it is not the usual one."""
    suffix = "" if host == QWEN3 else f"-{host}"
    return transformers_folder(stage.run) / f"{stage.run.name}-{stage.name}{suffix}-{dtype}"


def planned_path(request: TransformersRequest) -> Path:
    """The folder that a request is about to write, found without hashing or loading anything.

    Raises:
        ConfigError: the architecture asked for is none, or lacks features of the model.
        MissingArtifact: the stage has no checkpoint.
        IntegrityError: its checkpoint says nothing sensible about itself.
    """
    stage = request.stage
    path = checkpoint_files.checkpoint_dir(stage, checkpoint_files.latest_step(stage))
    arch = architecture_of(path, checkpoint_files.read_meta(path))
    return request.out or default_path(stage, request.dtype, choose_host(request.host, arch, stage.run.name))


def export_transformers(
    request: TransformersRequest,
    *,
    on_progress: Progress = lambda phase, done, total: None,
    on_checks: OnChecks = lambda checks: None,
) -> dict[str, Any]:
    """Write the folder, check it with the real library, and give it its name.

    Args:
        on_checks: called with the table before the verdict, so that a failed one can be shown too.

    Returns:
        the report, as in `export.json`.

    Raises:
        ConfigError: an architecture or a type that there is not, features that do not fold, or a folder of that name.
        MissingArtifact: the stage has no checkpoint.
        IntegrityError: the checkpoint is damaged, or the export does not agree with it; then it is `….failed`.
        HostError: no room on the disk.
    """
    dtype = request.dtype
    if dtype not in shards.TYPES:
        raise ConfigError(f"there is no type `{dtype}`", hint=f"choose one of {', '.join(shards.TYPES)}")
    checkpoint = folding.open_checkpoint(request.stage)
    arch = checkpoint.arch
    host = choose_host(request.host, arch, request.stage.run.name)
    out = request.out or default_path(request.stage, dtype, host)
    parity.claim(out, force=request.force)
    tokenizer = folding.open_tokenizer(checkpoint)
    provenance = provenance_of(checkpoint, request.license)
    shapes = table(arch, host)
    needed = shards.num_bytes(shapes, dtype)
    with unready(out) as folder:
        require_room(out, needed + _SMALL_FILES_BYTES, "free room, or name a folder on another disk with `--out DIR`")
        with disk_errors(folder):
            folder.mkdir()
        files = shards.write(
            folder, shards.layout(shapes, dtype, request.shard_bytes), tensors(checkpoint, host, dtype), dtype,
            on_progress=lambda done, total: on_progress("writing", done, total),
        )  # fmt: skip
        transformers_files.write(folder, arch, host, dtype, tokenizer, provenance)
        checks = transformers_check.checks(
            folder, checkpoint, tokenizer, tensors(checkpoint, host, dtype), host, dtype,
            is_chat=provenance.is_chat, on_progress=on_progress,
        )  # fmt: skip
        about = {
            "format": "transformers",
            "run": request.stage.run.name,
            "stage": request.stage.name,
            "step": checkpoint.step,
            "arch": host,
            "dtype": dtype,
            "bytes": needed,
            "sha256": files,
            "checkpoint_sha256": checkpoint.sha256,
            "recipe_sha256": provenance.recipe_sha256,
            "needs": f"transformers {transformers_files.OLDEST[host]} or later",
        }
        on_checks(checks)
        return parity.finish(folder, out, checks, about)


def choose_host(asked: str | None, arch: Architecture, run: str) -> str:
    """The class to export to.

    Raises:
        ConfigError: there is no such class, or the model has features that it lacks.
    """
    if asked is not None and asked not in ARCHES:
        raise ConfigError(f"there is no architecture `{asked}`", hint=f"choose one of {', '.join(ARCHES)}")
    blocking = features.blockers(arch)[features.TRANSFORMERS]
    if asked is None:
        return REMOTE if blocking else QWEN3
    if blocking and asked != REMOTE:
        raise ConfigError(
            f"run `{run}` cannot be exported as {asked}",
            cause=f"no stock architecture has {', '.join(blocking)}",
            hint=f"leave out `--arch`: `picollm export transformers --run {run}` takes the model's code with it",
        )
    return asked
