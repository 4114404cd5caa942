"""What the pretraining and SFT workers share: inputs checked against the recipe, model, batches, loop, record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from picollm.attention_choice import AttentionChoice, attention_for
from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.data.datasets import Dataset
from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.token_source import TokenSource
from picollm.errors import ConfigError, IntegrityError, Interrupted
from picollm.files import read_json, sha256_json
from picollm.model.attention import attention_device, kernel_that_ran
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import checkpoint, distributed
from picollm.train.checkpoint_files import checkpoint_dir
from picollm.train.loop import Job, train
from picollm.train.step import Trainer, build_trainer
from picollm.worker import Worker

TELL_EVERY_S = 1.0
PUT_BACK = "put the original back, or start a new run with `--run NAME`"


@dataclass(frozen=True)
class Inputs:
    """What the recipe names, opened and found to be the same."""

    recipe: TrainRecipe
    runtime: TrainRuntime
    tokenizer: Tokenizer
    datasets: list[Dataset]
    smaller_because: str | None = None  # why `runtime.json` asks for a smaller device batch


def read_inputs(worker: Worker) -> Inputs:
    """Parse the stage's config and open what it names.

    Raises:
        ConfigError: the config does not fit this version's schema.
        IntegrityError: the tokenizer or a dataset is not the one that the recipe names; both hashes are given.
    """
    try:
        recipe = TrainRecipe.model_validate(worker.config["recipe"])
        # The worker's config has `runtime.json` laid over it; there a back-off after running out of memory says why.
        settings = dict(worker.config["runtime"])
        reason = settings.pop("reason", None)
        runtime = TrainRuntime.model_validate(settings)
    except ValidationError as error:
        raise _not_a_config(worker.stage, error) from error
    run = worker.stage.run
    tokenizer = Tokenizer.load(run.tokenizer)
    require_same(worker, "tokenizer", tokenizer.sha256, recipe.tokenizer_sha256)
    datasets = []
    for source in recipe.data:
        dataset = Dataset.open(source.dataset, base=run.base, keep=(source.sha256,))
        require_same(worker, f"dataset `{source.dataset}`", dataset.sha256, source.sha256)
        datasets.append(dataset)
    return Inputs(recipe, runtime, tokenizer, datasets, reason)


def _not_a_config(stage: StageDir, error: ValidationError) -> ConfigError:
    """What is wrong with a stage's config, in the file that says it."""
    wrong = error.errors(include_url=False)
    cause = "; ".join(f"`{'.'.join(str(part) for part in one['loc'])}`: {one['msg']}" for one in wrong)
    changed = read_json(stage.runtime_path) if stage.runtime_path.is_file() else {}
    if isinstance(changed, dict) and any(one["loc"][0] in changed for one in wrong):
        hint = f"remove it: `{stage.config_path.name}` holds the first values"
        return ConfigError(f"`{stage.runtime_path}` changes the runtime to what cannot be", cause=cause, hint=hint)
    return ConfigError(f"`{stage.config_path}` is not a training config", cause=cause)


def require_same(worker: Worker, what: str, found: str, recorded: str, *, hint: str = PUT_BACK) -> None:
    """Compare an input's hash with the one in the recipe.

    Raises:
        IntegrityError: they differ; both are given.
    """
    if found != recorded:
        stage = worker.stage
        raise IntegrityError(
            f"the {what} is not the one that `{stage.name}` of run `{stage.run.name}` was prepared with",
            cause=f"its sha256 is {found[:12]}…, the recipe names {recorded[:12]}…",
            hint=hint,
        )


def run_training(
    worker: Worker,
    inputs: Inputs,
    *,
    sources: Sequence[TokenSource],
    weights: Sequence[float],
    evaluate: Callable[[GPT, int], dict[str, float]],
    initialise: Callable[[GPT], None] | None = None,
) -> None:
    """Train as the recipe says, from the last checkpoint if there is one, and write the stage record.

    Args:
        sources: documents as tokens, with their shares `weights`.
        evaluate: model and step -> values to record; called on all ranks, see `evaluating`.
        initialise: gives a stage's first weights, where they are not random.
    """
    recipe, runtime, stage = inputs.recipe, inputs.runtime, worker.stage
    length = recipe.model.max_position_embeddings
    rows = recipe.batch_tokens // length
    if rows * length != recipe.batch_tokens or rows % worker.world:
        raise ConfigError(
            f"train.batch_tokens ({recipe.batch_tokens}) is not {worker.world} times a whole number of rows",
            cause=f"a row is {length} tokens",
            hint=f"use a multiple of {length * worker.world}",
        )
    attention = attention_for(
        recipe.model,
        recipe.dtype,
        attention_device(worker.device),
        runtime.attention,
        documents=recipe.packing == "documents",
    )
    trainer = build_trainer(recipe, runtime, attention, worker.device)
    model = trainer.model
    if initialise is not None and not stage.finished_steps():
        initialise(model)
    packer = RowPacker(
        Mixture(sources, weights, recipe.seed),
        length=length,
        bos=inputs.tokenizer.bos,
        seed=recipe.seed,
        buffer_size=recipe.buffer_documents,
        packing=recipe.packing,
    )
    batches = Batches(
        packer,
        rows_per_step=rows,
        device_batch_size=runtime.device_batch_size,
        rank=worker.rank,
        world=worker.world,
    )

    _tell_how(worker, inputs, attention, trainer)
    result = train(worker, Job(recipe, runtime, trainer, batches, lambda step: evaluate(model, step)))
    if worker.rank == 0:
        result |= _what_was_read(packer, [source.dataset for source in recipe.data])
        final = checkpoint_dir(stage, recipe.steps)
        outputs = sorted(path for path in final.rglob("*") if path.is_file())
        stage.write_record({"recipe": sha256_json(worker.config["recipe"])}, outputs, result)


def _what_was_read(packer: RowPacker, names: Sequence[str]) -> dict[str, Any]:
    """For the stage record: per dataset documents, tokens, epochs and true share, and the share of tokens cut."""
    drawn = zip(names, packer.documents.describe(), strict=True)
    return {
        "cut_share": round(packer.cut_share, 4),
        "data": [{"dataset": name, **part} for name, part in drawn],
    }


def _tell_how(worker: Worker, inputs: Inputs, attention: AttentionChoice, trainer: Trainer) -> None:
    """Note what decides about speed, and why it is so."""
    recipe, runtime = inputs.recipe, inputs.runtime
    processes = "1 process" if worker.world == 1 else f"{worker.world} processes"
    threads = f"{runtime.threads} thread{'s' * (runtime.threads > 1)}{' each' * (worker.world > 1)}"
    parts = [f"{processes}, {threads}", f"{recipe.dtype}: {recipe.dtype_reason}"]
    if recipe.fp8:
        parts.append(f"fp8: {recipe.fp8_reason}" if trainer.fp8 else "no fp8: no matrix is large enough for it")
    parts.append(f"{attention} attention: {attention.reason}")
    worker.note("; ".join(parts))
    model = trainer.model
    if worker.rank == 0 and (kernels := kernel_that_ran(attention, model.arch, model.compute_dtype, trainer.device)):
        worker.note(kernels)
    if inputs.smaller_because:
        worker.note(f"{runtime.device_batch_size} rows at a time: {inputs.smaller_because}", level="warning")


def load_first_weights(model: GPT, worker: Worker, source: str, sha256: str) -> None:
    """Start from another stage's newest checkpoint.

    Raises:
        IntegrityError: it is damaged, or not the one that the recipe names.
    """
    loaded = checkpoint.load_model(worker.stage.run.stage(source))
    require_same(worker, f"model of stage `{source}`", loaded.sha256, sha256)
    with torch.no_grad():
        for own, first in zip(model.parameters(), loaded.model.parameters(), strict=True):
            own.copy_(first)


@contextlib.contextmanager
def evaluating(worker: Worker) -> Iterator[Callable[[float], None]]:
    """Say so while the body evaluates, and end it on all ranks when one of them was asked to stop.

    Yields:
        to be called with the share done, equally often on all ranks.

    Raises:
        Interrupted: in that call, on all ranks.
    """
    worker.event("phase", text="evaluating…")
    told_at = time.monotonic()

    def look(share: float) -> None:
        nonlocal told_at
        if distributed.any_rank(worker.should_stop()):
            raise Interrupted("stopped while it evaluated; the weights are saved")
        if (now := time.monotonic()) - told_at >= TELL_EVERY_S:
            told_at = now
            worker.event("phase", text=f"evaluating, {share:.0%} done…")

    yield look
    worker.event("phase", text="")
