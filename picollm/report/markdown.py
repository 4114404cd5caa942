"""The figures of a run as a page for a person."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from picollm.config.keys import flatten
from picollm.report.plots import UNITS
from picollm.report.text import ABSENT, cell, count, decimal, listed, plain, short_hash, table
from picollm.units import duration, size

Figures = dict[str, Any]

NAMES = {"pretrain": "Pretraining", "sft": "Fine-tuning", "rl": "Reinforcement learning"}
DONE = {"pretrain": "pretrained", "sft": "fine-tuned", "rl": "reinforced"}
_TRAINED, _HELD_OUT = "_train", "_held_out"
# Rows of the recipe table that are shown elsewhere, or are tables themselves.
_RECIPE_ELSEWHERE = frozenset({"stage", "model", "data", "dtype_reason"})


def render(figures: Figures, *, plot: str | None) -> str:
    """The whole page.

    Args:
        plot: path of the loss curve relative to the page, None where there is nothing to draw.
    """
    sections = [
        f"# Run `{figures['run']}`\n\n{headline(figures)}",
        *_missing(figures),
        "## Summary\n\n" + table(["", ""], summary(figures)),
        *_loss(figures, plot),
        *_data(figures),
        *_recipe(figures),
        *_evaluation(figures),
        *_samples(figures),
        *_notes(figures),
        *_commands(figures),
        *_environment(figures),
        *_use(figures),
    ]
    return "\n\n".join(sections) + "\n"


def headline(figures: Figures) -> str:
    """What was trained, in one or two sentences."""
    model = figures["model"]
    if model is None:
        return "Nothing has been trained in this run yet."
    sources = {name: [source["dataset"] for source in of_stage] for name, of_stage in figures["data"].items()}
    parts = [
        f"{DONE.get(name, name)} on {listed([f'`{source}`' for source in sources[name]])} "
        f"for {stage['steps']:,} steps ({count(stage['tokens'])} tokens)"
        for name, stage in figures["stages"].items()
        if stage["steps"]
    ]
    lead = f"A model of {count(model['num_params'])} parameters from preset `{figures['preset']}`"
    return f"{lead}, {', then '.join(parts) or 'not trained yet'}."


def summary(figures: Figures) -> list[tuple[str, str]]:
    """(label, value) of what a reader wants first; also what the command prints."""
    rows = []
    if model := figures["model"]:
        shape = f"{model['num_hidden_layers']} layers, width {model['hidden_size']:,}, {model['arch']}"
        rows.append(("Model", f"{model['num_params']:,} parameters, {shape}"))
    if tokenizer := figures["tokenizer"]:
        tokens = f"{tokenizer['vocab_size']:,} tokens, " if "vocab_size" in tokenizer else ""
        rows.append(("Tokenizer", f"{tokens}sha256 {short_hash(tokenizer['sha256'])}"))
    for name, stage in figures["stages"].items():
        rows.append((NAMES.get(name, name), _progress(stage)))
    for name, stage in figures["stages"].items():
        if checkpoint := stage["checkpoint"]:
            rows.append((f"Weights, {name}", f"`{checkpoint['path']}`, sha256 {short_hash(checkpoint['sha256'])}"))
    if stages := [stage for stage in figures["stages"].values() if stage["steps"]]:
        rows.append(("Compute type", f"{stages[0]['recipe']['dtype']}: {stages[0]['recipe']['dtype_reason']}"))
        rows.append(("Training time", _training_time(stages)))
        if peaks := [stage["peak_mem_gib"] for stage in stages if stage["peak_mem_gib"] is not None]:
            rows.append(("Peak memory", f"{size(max(peaks) * 2**30)} in a training process"))
        rows.append(("When", f"{stages[0]['started_at']} to {stages[-1]['ended_at']}"))
    if figures["wall_s"]:
        rows.append(("Time by stage", ", ".join(f"{name} {duration(s)}" for name, s in figures["wall_s"].items())))
    for name, evaluation in figures["evaluation"].items():
        for suite, tasks in evaluation["suites"].items():
            rows += [(f"{label}, {name}", text) for label, text in _scores(suite, tasks)]
    return rows


# -- sections ---------------------------------------------------------------------------------------------------------


def _missing(figures: Figures) -> list[str]:
    if not figures["missing_stages"]:
        return []
    names = listed([f"`{name}`" for name in figures["missing_stages"]])
    verb = "has" if len(figures["missing_stages"]) == 1 else "have"
    return [f"**Not complete: {names} {verb} not finished.** Continue with `picollm speedrun --run {figures['run']}`."]


def _loss(figures: Figures, plot: str | None) -> list[str]:
    rows = [
        (
            NAMES.get(name, name),
            decimal(stage["loss_first"], 3),
            decimal(stage["loss_final"], 3),
            f"{stage['tokens']:,}",
            f"{stage['tokens_per_s']:,.0f}" if stage["tokens_per_s"] else ABSENT,
            _last_validation(stage),
        )
        for name, stage in figures["stages"].items()
        if stage["steps"]
    ]
    if not rows:
        return []
    spans = {stage["loss_final_steps"] for stage in figures["stages"].values() if stage["steps"]}
    losses = table(["Stage", "First loss", "Final loss", "Tokens", "Tokens/s", "Validation"], rows, right="1234")
    steps = listed([str(number) for number in sorted(spans)])
    note = f"Losses are nats per token; the final one is the mean of the last {steps} steps."
    picture = [f"![Training loss and validation over tokens]({plot})"] if plot else []
    return ["\n\n".join(["## Loss", *picture, losses, note])]


def _data(figures: Figures) -> list[str]:
    rows = [
        (
            NAMES.get(name, name),
            f"`{source['dataset']}`",
            source.get("kind") or "gone or changed since",
            _rows(source, "train"),
            _rows(source, "validation"),
            decimal(source["weight"], 2),
            f"{source['share']:.1%}, {source['epochs']:.2f} epochs" if "share" in source else ABSENT,
            f"`{short_hash(source['sha256'])}`",
        )
        for name, sources in figures["data"].items()
        for source in sources
    ]
    if not rows:
        return []
    head = ["Stage", "Dataset", "Kind", "Train rows", "Validation rows", "Weight", "Tokens read", "sha256"]
    note = "The hash is that of `dataset.json`, which pins every file; `report.json` lists them with their own."
    cut = ((figures["stages"].get("pretrain") or {}).get("result") or {}).get("cut_share")
    if cut is not None:
        note += f" Of pretraining's tokens {cut:.1%} stand in pieces that were cut to fill a row; none are left out."
    return ["## Data\n\n" + table(head, rows, right="3456") + "\n\n" + note]


def _recipe(figures: Figures) -> list[str]:
    stages = figures["stages"]
    if not stages:
        return []
    flat = {name: dict(flatten(stage["recipe"])) for name, stage in stages.items()}
    keys = [key for key in dict.fromkeys(k for values in flat.values() for k in values) if _shown(key)]
    rows = [(f"`{key}`", *(plain(flat[name].get(key)) for name in stages)) for key in keys]
    rows += [
        (f"runtime `{key}`", *(plain(stage["runtime"].get(key)) for stage in stages.values()))
        for key in dict.fromkeys(k for stage in stages.values() for k in stage["runtime"])
    ]
    text = "## Recipe\n\n" + table(["", *(NAMES.get(name, name) for name in stages)], rows)
    if model := figures["model"]:
        text += "\n\n### Model\n\n" + table(["", ""], [(f"`{key}`", plain(value)) for key, value in model.items()])
    if sources := figures["settings"]["sources"]:
        values = dict(flatten(figures["settings"]["config"]))
        rows = [(f"`{key}`", plain(values.get(key)), source) for key, source in sources.items()]
        text += "\n\n### Settings that are not defaults\n\n" + table(["Key", "Value", "Set by"], rows)
    return [text]


def _evaluation(figures: Figures) -> list[str]:
    parts = []
    for name, evaluation in figures["evaluation"].items():
        for suite, tasks in evaluation["suites"].items():
            scored = {task: result for task, result in tasks.items() if "score" in result}
            if scored:
                title = f"### `{suite}` of {NAMES.get(name, name).lower()}, step {evaluation['step']:,}"
                parts.append(f"{title}\n\n{_pairs(scored) if suite == 'chat' else _singles(suite, scored)}")
    note = "Scores are shares of right answers, 0 to 1; fewer bits per byte are better; ± is one standard error."
    if "bpb" in figures["evaluation"].get("sft", {}).get("suites", {}):
        note += (
            " Bits per byte of fine-tuning are those of the same raw text after it learnt to answer, which costs some; "
            "the base model's stand under Loss."
        )
    return ["\n\n".join(["## Evaluation", note, *parts])] if parts else []


def _singles(suite: str, tasks: Figures) -> str:
    unit = "Bits per byte" if suite == "bpb" else "Score"
    rows = [(f"`{task}`", _score(result, 4), plain(result["n"])) for task, result in tasks.items()]
    return table(["Text" if suite == "bpb" else "Task", unit, "n"], rows, right="12")


def _pairs(tasks: Figures) -> str:
    """A line per task: facts it was trained on beside held-out ones."""
    rows = []
    for name in dict.fromkeys(task.removesuffix(_TRAINED).removesuffix(_HELD_OUT) for task in tasks):
        pair = [tasks.get(name + ending) for ending in (_TRAINED, _HELD_OUT)]
        if pair == [None, None]:
            pair = [None, tasks[name]]
        rows.append((f"`{name}`", *(text for r in pair for text in (_score(r, 3), plain(r["n"] if r else None)))))
    return table(["Task", "Trained on", "n", "Held out", "n"], rows, right="1234")


def _samples(figures: Figures) -> list[str]:
    parts = []
    for stage in dict.fromkeys(sample["stage"] for sample in figures["samples"]):
        texts = [f"> {s['prompt']}\n{s['text'].strip()}" for s in figures["samples"] if s["stage"] == stage]
        text = "\n\n".join(texts)
        # A fence longer than any inside, so that no reply can end it.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
        parts.append(f"What {NAMES.get(stage, stage).lower()} made, decoded greedily:\n\n{fence}text\n{text}\n{fence}")
    return ["\n\n".join(["## Samples", *parts])] if parts else []


def _notes(figures: Figures) -> list[str]:
    lines = []
    for name, stage in figures["stages"].items():
        if stage["attempts"] > 1:
            steps = listed([f"{step:,}" for step in stage["resumed_from"]]) or "the beginning"
            lines.append(f"- {name}: {stage['attempts']} attempts, resumed from step {steps}")
        lines += [f"- {name}: {cell(note)}" for note in dict.fromkeys(stage["notes"])]
    lines += [f"- {cell(note)}" for note in dict.fromkeys(figures["notes"])]
    return ["\n".join(["## Notes", "", *lines])] if lines else []


def _commands(figures: Figures) -> list[str]:
    rows = [
        (
            entry["started_at"],
            ", ".join(entry["stages"]),
            _fact("command", entry["command"]),
            "; ".join(f"`{key}` {plain(now)}, not {plain(was)}" for key, (was, now) in entry["other"].items())
            or ABSENT,
        )
        for entry in figures["commands"]
    ]
    head = ["From", "Stages", "Command", "Other than under Environment"]
    return ["## Commands\n\n" + table(head, rows)] if rows else []


def _environment(figures: Figures) -> list[str]:
    """Code and machine of the command that made the run."""
    facts = dict(figures["environment"])
    packages = facts.pop("packages", {})
    rows = [(f"`{key}`", _fact(key, value)) for key, value in flatten(facts) if key != "schema"]
    rows += [("`packages`", plain(packages))] if packages else []
    return ["## Environment\n\n" + table(["", ""], rows)] if rows else []


def _fact(key: str, value: Any) -> str:
    """One fact of the environment: the command as it can be typed again, memory with its unit."""
    if key == "command" and isinstance(value, list):
        return f"`{shlex.join(value)}`"
    if key.endswith("_bytes") and isinstance(value, int):
        return size(value)
    return plain(value)


def _use(figures: Figures) -> list[str]:
    if not any(stage["state"] == "finished" for stage in figures["stages"].values()):
        return []
    run = figures["run"]
    commands = [
        f"picollm chat --run {run}",
        f"picollm eval --run {run}",
        f"picollm manifest verify --run {run}",
    ]
    return ["## Use it\n\n```bash\n" + "\n".join(commands) + "\n```"]


# -- pieces of text ---------------------------------------------------------------------------------------------------


def _progress(stage: Figures) -> str:
    if stage["state"] == "not started":
        return "not started"
    total = f" of {stage['total_steps']:,}" if stage["total_steps"] else ""
    text = f"{stage['state']}, {stage['steps']:,}{total} steps, {count(stage['tokens'])} tokens"
    if stage["loss_final"] is not None:
        text += f", loss {stage['loss_first']:.2f} → {stage['loss_final']:.3f}"
    if stage["validation"]:
        text += f", validation {_last_validation(stage)}"
    return text


def _training_time(stages: Sequence[Figures]) -> str:
    text = f"{duration(sum(stage['wall_s'] or 0.0 for stage in stages))} on the clock"
    if all(stage["cpu_s"] is not None for stage in stages):
        text += f", {sum(stage['cpu_s'] for stage in stages):,.0f} CPU-seconds"
    return text


def _scores(suite: str, tasks: Figures) -> list[tuple[str, str]]:
    """One line of scores, or two where tasks come in trained and held-out pairs; (label, text)."""
    tasks = {task: result for task, result in tasks.items() if "score" in result}
    if suite == "bpb":
        return [("Bits per byte", ", ".join(f"{_score(result, 4)}, {task}" for task, result in tasks.items()))]
    lines = []
    for ending, words in ((_HELD_OUT, "held out"), (_TRAINED, "trained on")):
        parts = [f"{t.removesuffix(ending)} {_score(r, 2)}" for t, r in tasks.items() if t.endswith(ending)]
        lines.append((f"{suite.capitalize()}, {words}", ", ".join(parts)))
    others = [f"{t} {_score(r, 2)}" for t, r in tasks.items() if not t.endswith((_HELD_OUT, _TRAINED))]
    return [(label, text) for label, text in [*lines, (suite.capitalize(), ", ".join(others))] if text]


def _score(result: Figures | None, digits: int) -> str:
    if result is None:
        return ABSENT
    error = f" ± {result['stderr']:.{digits}f}" if result.get("stderr") is not None else ""
    return f"{decimal(result['score'], digits)}{error}"


def _last_validation(stage: Figures) -> str:
    if not stage["validation"]:
        return ABSENT
    # Of a mixture each pass has several values, its mean first.
    last = [value for value in stage["validation"] if value["name"] == stage["validation"][0]["name"]][-1]
    error = f" ± {last['stderr']:.4f}" if last["stderr"] is not None else ""
    return f"{decimal(last['value'], 4)}{error} {UNITS.get(last['name'], last['name'])}"


def _rows(source: Figures, split: str) -> str:
    files = [file for file in source.get("files") or [] if file["split"] == split]
    known = files and all(file["rows"] is not None for file in files)
    return f"{sum(file['rows'] for file in files):,}" if known else ABSENT


def _shown(key: str) -> bool:
    return key.split(".")[0] not in _RECIPE_ELSEWHERE
