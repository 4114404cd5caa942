"""Scores one suite on one checkpoint: `bpb`, `samples` or `chat`. `python -m picollm.stages.eval RUN/eval/STAGE-SUITE`.

Results are written whole at the end; a suite that was interrupted runs again from its start.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from picollm.config.recipe import EvalRecipe, EvalRuntime
from picollm.data.datasets import Dataset
from picollm.errors import ConfigError, Interrupted
from picollm.evaluate import bits_per_byte, chat, samples
from picollm.evaluate.tasks import toy_world
from picollm.files import SCHEMA, sha256_json, write_atomic, write_json
from picollm.generate.engine import Engine
from picollm.generate.session import TrainedModel, open_stage
from picollm.stages.training import require_same
from picollm.worker import Worker, run

PROGRESS_EVERY_S = 0.5
PREPARE_AGAIN = "run `picollm eval` again: it prepares the evaluation for what is there now"

Scores = dict[str, dict[str, Any]]
Records = list[dict[str, Any]]


def main(worker: Worker) -> None:
    try:
        recipe = EvalRecipe.model_validate(worker.config["recipe"])
        runtime = EvalRuntime.model_validate(worker.config["runtime"])
    except ValidationError as error:
        raise ConfigError(f"`{worker.stage.config_path}` is not an evaluation's config", cause=str(error)) from error
    trained = open_stage(worker.stage.run.stage(recipe.source), device=str(worker.device))
    require_same(
        worker, f"model of stage `{recipe.source}`", trained.sha256, recipe.checkpoint_sha256, hint=PREPARE_AGAIN
    )
    suites: dict[str, Callable[..., tuple[Scores, Records]]] = {"bpb": _bpb, "samples": _samples, "chat": _chat}
    scores, records = suites[recipe.suite](worker, recipe, runtime, trained)
    _write(worker, recipe, scores, records)


def _bpb(worker: Worker, recipe: EvalRecipe, runtime: EvalRuntime, trained: TrainedModel) -> tuple[Scores, Records]:
    """Bits per byte of the validation split: `validation`; of a mixture also `validation/NAME` of each."""
    splits = {}
    for source in recipe.data:
        dataset = Dataset.open(source.dataset, base=worker.stage.run.base, keep=(source.sha256,))
        require_same(worker, f"dataset `{dataset.name}`", dataset.sha256, source.sha256, hint=PREPARE_AGAIN)
        splits[dataset.name] = dataset.documents("validation")
    splits = {name: documents for name, documents in splits.items() if len(documents)} or splits
    look, before = _progress(worker, sum(map(len, splits.values()))), 0
    scores: Scores = {}
    for name, documents in splits.items():
        found = bits_per_byte.evaluate(
            trained.model,
            trained.tokenizer,
            documents,
            trained.model.arch.max_position_embeddings,
            runtime.batch_size,
            recipe.bpb_tokens,
            on_progress=lambda done, before=before: look(before + done),
        )
        before += len(documents)
        scores[f"validation/{name}"] = {
            "n": found.documents,
            "score": found.bpb,
            "stderr": found.stderr,
            "unit": "bits per byte",
            "bytes": found.bytes,
            "tokens": found.tokens,
            "nats": found.nats,
        }
    if len(scores) == 1:
        scores = {"validation": next(iter(scores.values()))}
    else:
        weights = [source.weight for source in recipe.data if source.dataset in splits]
        scores = {"validation": _mean(list(scores.values()), weights), **scores}
    for name, score in scores.items():
        told = name.replace("validation", "bpb", 1)
        worker.event("eval", step=recipe.step, name=told, value=score["score"], stderr=score["stderr"], n=score["n"])
    return scores, []


def _mean(parts: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """The mean over a mixture's datasets, each weighted as its share says; sums of the rest."""
    shares = [weight / sum(weights) for weight in weights]
    stderr = None
    if all(part["stderr"] is not None for part in parts):
        stderr = math.hypot(*(share * part["stderr"] for share, part in zip(shares, parts, strict=True)))
    return {
        "n": sum(part["n"] for part in parts),
        "score": math.fsum(share * part["score"] for share, part in zip(shares, parts, strict=True)),
        "stderr": stderr,
        "unit": "bits per byte",
        **{key: sum(part[key] for part in parts) for key in ("bytes", "tokens", "nats")},
    }


def _samples(worker: Worker, recipe: EvalRecipe, runtime: EvalRuntime, trained: TrainedModel) -> tuple[Scores, Records]:
    """Replies to the fixed prompts, for people to read."""
    longest = trained.model.arch.max_position_embeddings
    prompts = samples.prompts(trained.tokenizer, trained.is_chat, longest)
    engine = _engine(trained, [ids for _, ids in prompts], runtime.batch_size, recipe.max_new_tokens)
    records = samples.evaluate(
        engine,
        trained.tokenizer,
        chat=trained.is_chat,
        max_new_tokens=recipe.max_new_tokens,
        on_progress=_progress(worker, len(prompts)),
    )
    for record in records:
        worker.event("sample", step=recipe.step, prompt=record["prompt"], text=record["text"])
    return {"prompts": {"n": len(records)}}, records


def _chat(worker: Worker, recipe: EvalRecipe, runtime: EvalRuntime, trained: TrainedModel) -> tuple[Scores, Records]:
    """The toy world's tasks, on trained and on held-out facts."""
    tasks = toy_world.tasks(recipe.questions, recipe.seed)
    prompts = [chat.prompt_ids(trained.tokenizer, question) for task in tasks for question in task.questions]
    engine = _engine(trained, prompts, runtime.batch_size, recipe.max_new_tokens)
    scores, records = chat.evaluate(
        engine, trained.tokenizer, tasks, recipe.max_new_tokens, _progress(worker, len(prompts))
    )
    for name, score in scores.items():
        worker.event("eval", step=recipe.step, name=name, value=score["score"], stderr=score["stderr"], n=score["n"])
    return scores, records


def _engine(trained: TrainedModel, prompts: list[list[int]], batch_size: int, max_new_tokens: int) -> Engine:
    """An engine with as many slots and as much context as these prompts can use."""
    needed = max((len(ids) for ids in prompts), default=1) + max_new_tokens
    capacity = min(trained.model.arch.max_position_embeddings, needed)
    return Engine(trained.model, trained.tokenizer, max(1, min(batch_size, len(prompts))), capacity)


def _progress(worker: Worker, total: int) -> Callable[[int], None]:
    """Begin the stage; the callback tells how far it is, and ends it when a stop was asked for: nothing is kept.

    Args:
        total: documents or questions that will be done at the end; a limit in tokens may end it sooner.
    """
    worker.start(total_steps=total)
    told_at, told = time.monotonic(), 0

    def look(done: int) -> None:
        nonlocal told_at, told
        if worker.should_stop():
            raise Interrupted(f"stopped {worker.stage.name}; it starts anew next time")
        now = time.monotonic()
        if done > told and (done == total or now - told_at >= PROGRESS_EVERY_S):
            worker.event("step", step=done, dt_s=round(now - told_at, 3))
            told_at, told = now, done

    return look


def _write(worker: Worker, recipe: EvalRecipe, scores: Scores, records: Records) -> None:
    """`results.json`, `samples.jsonl` where the suite decodes, and the record last."""
    stage = worker.stage
    results: Path = stage.path / "results.json"
    write_json(
        results,
        {
            "schema": SCHEMA,
            "run": stage.run.name,
            "stage": recipe.source,
            "step": recipe.step,
            "checkpoint_sha256": recipe.checkpoint_sha256,
            "suites": {recipe.suite: scores},
        },
    )
    outputs = [results]
    if recipe.suite != "bpb":
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        outputs.append(stage.path / "samples.jsonl")
        write_atomic(outputs[-1], lines)
    stage.write_record(
        {"recipe": sha256_json(worker.config["recipe"])},
        outputs,
        {"step": recipe.step, **scores},
    )


if __name__ == "__main__":
    run(main)
