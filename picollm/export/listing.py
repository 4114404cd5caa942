"""What a run can be exported to, and what was. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from picollm.config.model import Architecture
from picollm.config.resolve import resolve_existing
from picollm.errors import IntegrityError, MissingArtifact
from picollm.export import features
from picollm.files import read_json
from picollm.run_dir import TRAINING_STAGES, RunDir, StageDir
from picollm.scaling import architecture

REPORT = "export.json"  # as `parity.finish` calls it, which needs torch


def targets(run: RunDir) -> dict[str, features.Export]:
    """Each target with whether it is possible, and why or why not: by what was trained, or else is planned.

    Raises:
        IntegrityError: the run's config or a stage's is torn or was edited.
    """
    config = resolve_existing(run.read_config()).config
    digits = config.tokenizer.digits
    for stage in map(run.stage, reversed(TRAINING_STAGES)):
        if stage.config_path.is_file():
            return features.exports(_trained(stage), digits=digits)
    return features.exports(architecture(config), digits=digits)


def _trained(stage: StageDir) -> Architecture:
    try:
        return Architecture.model_validate(stage.read_config()["recipe"].get("model"))
    except ValidationError as error:
        raise IntegrityError(
            f"`{stage.config_path}` describes no model we know",
            cause=str(error.errors(include_url=False)[0]["msg"]),
            hint=f"restore it, or redo the stage with `picollm speedrun --run {stage.run.name} --force {stage.name}`",
        ) from error


def made(run: RunDir) -> list[dict[str, Any]]:
    """Exports inside the run, oldest first, each with its path and the main fields of its report; failed ones too."""
    found = []
    for report in sorted((run.path / "export").rglob(f"*{REPORT}"), key=lambda path: path.stat().st_mtime):
        value = read_json(report, hint="remove it, and export again with `--force`")
        if not isinstance(value, dict):
            continue
        path = report.parent if report.name == REPORT else report.with_name(report.name.removesuffix(f".{REPORT}"))
        if path.exists():
            found.append(
                {"path": str(path), **{key: value.get(key) for key in ("format", "stage", "arch", "quant", "ok")}}
            )
    return found


def newest_gguf(run: RunDir, stage: StageDir | None = None) -> Path:
    """The GGUF file that was exported last and passed its checks, of the furthest stage unless one is named.

    Raises:
        MissingArtifact: there is none.
    """
    files = [export for export in made(run) if export["format"] == "gguf" and export["ok"]]
    for name in reversed(TRAINING_STAGES) if stage is None else [stage.name]:
        if found := [export["path"] for export in files if export["stage"] == name]:
            return Path(found[-1])
    option = "" if stage is None else f" --stage {stage.name}"
    raise MissingArtifact(
        f"run `{run.name}` has no GGUF file" + ("" if stage is None else f" of stage `{stage.name}`"),
        cause=f"there is none in `{run.path / 'export'}` that passed its checks",
        hint=f"make one with `picollm export gguf --run {run.name}{option}`",
    )
