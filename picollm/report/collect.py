"""A run's folder -> one JSON value with every figure of the report.

Everything is read from what the stages left behind (recipes, events, records, results); nothing is measured again,
so the same folder gives the same bytes. What is not there is None, never guessed.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from picollm.config.keys import flatten
from picollm.errors import IntegrityError, MissingArtifact
from picollm.events import Event, attempts, read_all, read_events
from picollm.files import SCHEMA, read_json
from picollm.run_dir import TRAINING_STAGES, RunDir, StageDir
from picollm.train.checkpoint_files import checkpoint_dir, checkpoint_sha256, read_meta

# Steps averaged for the loss at the end: one step's loss swings with its documents.
FINAL_STEPS = 20
# What a run is made of, in order; `rl` comes only where somebody asked for it.
EXPECTED_STAGES = ("tokenizer", "pretrain", "sft", "eval")

Figures = dict[str, Any]


def collect(run: RunDir) -> Figures:
    """Every figure of a run, finished or not.

    Raises:
        IntegrityError: a file of the run is torn or of another version.
    """
    stored, environment, happened = run.read_config(), _read(run.environment_path) or {}, read_all(run.events_path)
    stages = {name: _training(run.stage(name)) for name in TRAINING_STAGES if run.stage(name).config_path.is_file()}
    evaluation, samples = _evaluation(run)
    has_run = {
        "tokenizer": run.stage("tokenizer").record() is not None,
        **{name: figures["state"] == "finished" for name, figures in stages.items()},
        "eval": bool(evaluation) or bool(samples),
    }
    return {
        "schema": SCHEMA,
        "run": run.name,
        "preset": stored.get("preset"),
        "missing_stages": [name for name in EXPECTED_STAGES if not has_run.get(name, False)],
        "model": _model(stages),
        "tokenizer": _tokenizer(run),
        "data": {name: _sources(run, figures) for name, figures in stages.items()},
        "stages": stages,
        "evaluation": evaluation,
        "samples": samples,
        "wall_s": _stage_times(happened),
        "notes": [event.get("text", "") for event in happened if event["kind"] == "note"],
        "settings": {"sources": stored.get("sources", {}), "config": stored.get("config", {})},
        "environment": environment,
        "commands": _commands(happened, environment),
    }


def curve(events: list[Event]) -> list[dict[str, float | None]]:
    """The loss curve: `{"step", "tokens", "loss"}` of each step event, in order."""
    return [
        {"step": event["step"], "tokens": event.get("tokens"), "loss": event.get("loss")}
        for event in events
        if event["kind"] == "step" and "step" in event
    ]


# -- parts ------------------------------------------------------------------------------------------------------------


def _training(stage: StageDir) -> Figures:
    """One training stage: what it was asked, how far it came, at what pace."""
    config = stage.read_config()
    recipe, runtime = config["recipe"], config["runtime"]
    record = stage.record()
    everything, events = read_all(stage.events_path), read_events(stage.events_path)
    steps = [event for event in events if event["kind"] == "step"]
    done = steps[-1]["step"] if steps else 0
    losses = [event["loss"] for event in steps if _finite(event.get("loss"))]
    computed = [event for event in everything if event["kind"] == "step"]
    stepping_s = math.fsum(event.get("dt_s") or 0.0 for event in computed)
    checkpoint = _checkpoint(stage)
    return {
        "state": _state(record, everything),
        "steps": done,
        "total_steps": recipe.get("steps"),
        "tokens": done * recipe["batch_tokens"] if recipe.get("batch_tokens") else None,
        "loss_first": losses[0] if losses else None,
        "loss_final": math.fsum(losses[-FINAL_STEPS:]) / len(losses[-FINAL_STEPS:]) if losses else None,
        "loss_final_steps": len(losses[-FINAL_STEPS:]),
        "validation": [
            {key: event.get(key) for key in ("step", "name", "value", "stderr", "n")}
            for event in events
            if event["kind"] == "eval"
        ],
        **_timing(everything),
        "cpu_s": (record["result"] if record else checkpoint or {}).get("cpu_s"),
        "tokens_per_s": len(computed) * recipe.get("batch_tokens", 0) / stepping_s if stepping_s else None,
        "peak_mem_gib": max((event["mem_gib"] for event in computed if _finite(event.get("mem_gib"))), default=None),
        "attempts": attempts(stage.events_path),
        "resumed_from": [
            event["resumed_from"]
            for event in everything
            if event["kind"] == "stage_start" and event.get("resumed_from")
        ],
        "checkpoint": checkpoint,
        "recipe": recipe,
        "runtime": runtime,
        "result": record["result"] if record else None,
        "notes": [event.get("text", "") for event in everything if event["kind"] == "note"],
    }


def _checkpoint(stage: StageDir) -> Figures | None:
    """The newest checkpoint: step, weights and their hash, CPU-seconds behind it; None where there is none to trust."""
    try:
        step, sha256 = checkpoint_sha256(stage)
        folder = checkpoint_dir(stage, step)
        path = (folder / "model.safetensors").relative_to(stage.run.path).as_posix()
        return {"step": step, "path": path, "sha256": sha256, "cpu_s": read_meta(folder).get("cpu_s")}
    except (MissingArtifact, IntegrityError):
        return None


def _state(record: Figures | None, events: list[Event]) -> str:
    """`finished`, `stopped` (on request or by an error), `unfinished` (at work, or killed) or `not started`."""
    if record is not None:
        return "finished"
    boundaries = [event for event in events if event["kind"] in ("stage_start", "stage_end")]
    if not boundaries:
        return "not started"
    return "unfinished" if boundaries[-1]["kind"] == "stage_start" else "stopped"


def _timing(events: list[Event]) -> Figures:
    """When it ran (UTC), and seconds on the clock over all attempts, each from its start to its last word."""
    wall_s, start, last = 0.0, None, None
    for event in events:
        if event["kind"] == "stage_start":
            wall_s += _seconds(start, last)
            start = event.get("t")
        last = event.get("t", last)
    wall_s += _seconds(start, last)
    times = [event["t"] for event in events if _finite(event.get("t"))]
    return {
        "started_at": _utc(times[0]) if times else None,
        "ended_at": _utc(times[-1]) if times else None,
        "wall_s": round(wall_s, 3) if events else None,
    }


def _seconds(start: float | None, end: float | None) -> float:
    """Between two readings of the clock; none where one is missing or the clock was set back."""
    return 0.0 if start is None or end is None else max(0.0, end - start)


def _stage_times(events: list[Event]) -> dict[str, float]:
    """Seconds on the clock that the run's commands spent in each stage, all attempts together.

    The report itself and what follows are left out: they are not over yet when it is written first.
    """
    seconds: dict[str, float] = {}
    started: dict[str, float] = {}
    for event in events:
        stage = event["stage"]
        if event["kind"] == "stage_start":
            started[stage] = event["t"]
        elif event["kind"] == "stage_end" and stage in started:
            seconds[stage] = round(seconds.get(stage, 0.0) + _seconds(started.pop(stage), event["t"]), 3)
    return {stage: value for stage, value in seconds.items() if stage not in ("report", "manifest")}


def _model(stages: dict[str, Figures]) -> Figures | None:
    """Shape and size of what was trained; the recipe of the first stage decides for all."""
    from picollm.config.model import Architecture
    from picollm.scaling import num_params

    for figures in stages.values():
        if shape := figures["recipe"].get("model"):
            return {**shape, "num_params": num_params(Architecture.model_validate(shape)).total}
    return None


def _tokenizer(run: RunDir) -> Figures | None:
    record = run.stage("tokenizer").record()
    if record is None:
        return None
    output = record["outputs"].get("tokenizer.json", {})
    return {"sha256": output.get("sha256"), **record["result"]}


def _sources(run: RunDir, stage: Figures) -> list[Figures]:
    """What a recipe read: the record's true shares, and the dataset's own account where it can be found."""
    found = []
    sources = stage["recipe"].get("data", [])
    read = (stage["result"] or {}).get("data") or [{}] * len(sources)
    for source, part in zip(sources, read, strict=True):  # in one order; `[[sft.mix]]` may name a dataset twice
        figures = {**part, **source}
        if path := run.find_dataset_record(source["dataset"], source["sha256"]):
            description = read_json(path)
            figures |= {key: description.get(key) for key in ("kind", "source", "totals", "files")}
        found.append(figures)
    return found


def _commands(events: list[Event], first: Figures) -> list[Figures]:
    """The commands that worked on the run: stages in order, and what was not as when the run was made.

    Args:
        first: what `environment.json` says.
    """
    was = dict(flatten(first))
    found: list[Figures] = []
    for event in events:
        if event["kind"] != "command":
            continue
        now = dict(flatten({key: value for key, value in event.items() if key not in ("v", "t", "stage", "kind")}))
        command = now.pop("command", [])
        other = {key: [was[key], value] for key, value in now.items() if key in was and was[key] != value}
        stage = event["stage"].partition("/")[0]
        if found and (found[-1]["command"], found[-1]["other"]) == (command, other):
            found[-1]["stages"] += [stage] if stage not in found[-1]["stages"] else []
        else:
            found.append({"started_at": _utc(event["t"]), "stages": [stage], "command": command, "other": other})
    return found


def _evaluation(run: RunDir) -> tuple[Figures, list[Figures]]:
    """Scores as stage -> {"step", "suites": {suite: {task: …}}}, and the samples that were decoded."""
    scores: Figures = {}
    samples: list[Figures] = []
    for path in sorted((run.path / "eval").glob("*/results.json")):
        stage = StageDir(path.parent)
        if stage.record() is None:
            continue  # torn by a crash: the suite runs again
        results = stage.read_results()
        of_stage = scores.setdefault(results["stage"], {"step": results["step"], "suites": {}})
        for suite, tasks in results["suites"].items():
            of_stage["suites"][suite] = tasks
        samples += _samples(path.parent, results)
    order = {name: index for index, name in enumerate(TRAINING_STAGES)}
    return dict(sorted(scores.items(), key=lambda item: order.get(item[0], len(order)))), samples


def _samples(folder: Path, results: Figures) -> list[Figures]:
    """What the `samples` suite wrote; the replies of the chat tasks are too many for a report."""
    from json import JSONDecodeError, loads

    path = folder / "samples.jsonl"
    if "samples" not in results["suites"] or not path.is_file():
        return []
    try:
        lines = [loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"`{path}` is not readable JSON lines",
            cause=str(error),
            hint=f"remove `{folder}` and run `picollm eval` again",
        ) from error
    return [{"stage": results["stage"], "prompt": line["prompt"], "text": line["text"]} for line in lines]


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
