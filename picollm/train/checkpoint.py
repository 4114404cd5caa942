"""Weights and training state <-> a checkpoint folder. Tensors are filed under parameter names, in safetensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from picollm.config.model import Architecture
from picollm.errors import ConfigError, IntegrityError
from picollm.files import SCHEMA, disk_errors
from picollm.model.gpt import GPT
from picollm.optim.muon import MuonAdamW
from picollm.run_dir import StageDir
from picollm.train import checkpoint_files as files

STATE_FILE = "state/rank_0-of-1.safetensors"


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"`{path}` cannot be read as safetensors", cause=str(error), hint=files.RESTORE) from error


def save(
    stage: StageDir, step: int, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any], *, keep_last: int
) -> tuple[Path, int]:
    """Write the checkpoint of a step and make it the latest. Called by rank 0; every rank holds the same state.

    Args:
        meta: what the caller needs to go on (data position, hashes); `step` and the architecture are added.

    Returns:
        Its folder and its size in bytes.

    Raises:
        HostError: no room; earlier checkpoints are untouched.
    """
    temporary = files.begin(stage, step)
    state = _plain(optimizer.state_dict())
    index = {
        name: {"shape": list(t.shape), "rows": [0, t.shape[0] if t.dim() else 1], "file": Path(STATE_FILE).name}
        for name, t in state.items()
    }
    with disk_errors(temporary):
        try:
            save_file(_plain(dict(model.named_parameters())), temporary / "model.safetensors")
            save_file(state, temporary / STATE_FILE)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (temporary / "state/index.json").write_text(json.dumps(index, indent=1) + "\n")
        files.write_meta(temporary, {"schema": SCHEMA, "step": step, "model": model.arch.model_dump(), **meta})
    size = files.commit(stage, step, temporary, keep_last=keep_last)
    return files.checkpoint_dir(stage, step), size


def _architecture(path: Path, meta: dict[str, Any]) -> Architecture:
    try:
        return Architecture.model_validate(meta.get("model"))
    except ValidationError as error:
        raise IntegrityError(
            f"`{path / 'meta.json'}` describes no model we know", cause=_first(error), hint=files.RESTORE
        ) from error


def _first(error: ValidationError) -> str:
    """The first complaint of pydantic on one line."""
    detail = error.errors(include_url=False)[0]
    return f"`{'.'.join(map(str, ('model', *detail['loc'])))}`: {detail['msg']}"


def _check_shapes(path: Path, arch: Architecture) -> None:
    """Compare names and shapes in the weights' header with the architecture, before a byte is allocated for either.

    A hash proves only that whoever wrote the file also wrote its hash, and `meta.json` may ask for any size.

    Raises:
        IntegrityError: the file cannot be read, or holds other tensors.
    """
    file = path / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"`{file}` cannot be read as safetensors", cause=str(error), hint=files.RESTORE) from error
    wrong = f"{arch.num_hidden_layers} layers do not have {len(found)} tensors"
    if arch.num_hidden_layers < len(found):  # a layer has several tensors; building billions of layers would not end
        try:
            with torch.device("meta"):
                expected = {name: tuple(tensor.shape) for name, tensor in GPT(arch).named_parameters()}
        except (RuntimeError, OverflowError, TypeError) as error:
            expected, wrong = {}, str(error).splitlines()[0]
        if found == expected:
            return
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if expected:
            first = differing[0]
            wrong = f"`{first}` is {found.get(first, 'missing')} there and {expected.get(first, 'unknown')} by its meta"
    raise IntegrityError(f"the weights in `{path}` do not fit its architecture", cause=wrong, hint=files.RESTORE)


def load_weights(model: GPT, path: Path) -> None:
    """Copy a verified checkpoint's weights into a model of the same architecture.

    Raises:
        IntegrityError: names or shapes differ.
    """
    tensors = _load(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    wrong = sorted(
        name
        for name in parameters.keys() | tensors.keys()
        if name not in tensors or name not in parameters or tensors[name].shape != parameters[name].shape
    )
    if wrong:
        raise IntegrityError(
            f"the weights in `{path}` do not fit its architecture",
            cause=f"first of them: `{wrong[0]}`",
            hint=files.RESTORE,
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_training_state(model: GPT, optimizer: MuonAdamW, path: Path) -> dict[str, Any]:
    """Restore weights and optimizer from a checkpoint, after verifying every byte. Returns its meta.

    Raises:
        IntegrityError: damaged.
        ConfigError: of another architecture; both are named.
    """
    files.verify(path)
    meta = files.read_meta(path)
    if (found := _architecture(path, meta)) != model.arch:
        raise ConfigError(
            f"checkpoint `{path}` is of another architecture",
            cause=f"it has {found.model_dump()}, the recipe asks for {model.arch.model_dump()}",
            hint="start a new run with `--run NAME`",
        )
    load_weights(model, path)
    try:
        optimizer.load_state_dict(_load(path / STATE_FILE))
    except (KeyError, RuntimeError) as error:
        raise IntegrityError(
            f"the optimizer state in `{path}` does not fit the model", cause=str(error), hint=files.RESTORE
        ) from error
    return meta


def resume(stage: StageDir, model: GPT, optimizer: MuonAdamW) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest intact checkpoint of a stage.

    Returns:
        Its meta (None when the stage has none yet) and a warning for each damaged one that was passed over.

    Raises:
        IntegrityError: there are checkpoints and none is intact.
    """
    warnings: list[str] = []
    last: IntegrityError | None = None
    for step in reversed(stage.finished_steps()):
        path = files.checkpoint_dir(stage, step)
        try:
            return load_training_state(model, optimizer, path), warnings
        except IntegrityError as error:
            last = error
            warnings.append(f"checkpoint of step {step} is damaged ({error.message}); falling back to the one before")
    if last is not None:
        raise IntegrityError(
            f"no checkpoint of stage `{stage.name}` is intact",
            cause=last.message,
            hint=f"start the stage again with `picollm speedrun --run {stage.run.name} --force {stage.name}`",
        ) from last
    return None, warnings


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
    sums = files.verify(path, only=("model.safetensors", "meta.json"))
    meta = files.read_meta(path)
    arch = _architecture(path, meta)
    compute = getattr(torch, dtype)
    if not isinstance(tokenizer := meta.get("tokenizer_sha256"), str):
        raise IntegrityError(
            f"`{path / 'meta.json'}` is torn or was edited", cause="it names no tokenizer", hint=files.RESTORE
        )
    _check_shapes(path, arch)
    model = GPT(arch, compute_dtype=compute)
    load_weights(model, path)
    model = model.to(device=device, dtype=compute).eval().requires_grad_(False)
    return LoadedModel(model, arch, step, sums["model.safetensors"], tokenizer)
