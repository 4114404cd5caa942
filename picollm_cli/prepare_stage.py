"""Make a stage ready: write its `config.json`, the one thing its worker is given.

A stage's recipe is immutable once the stage has a checkpoint. What depends on the machine (compute type, fp8, threads)
is decided when a stage is first prepared and kept, so that a run that moves or resumes stays the same run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from picollm.errors import ConfigError, MissingArtifact
from picollm.files import SCHEMA, disk_errors, sha256_json, write_atomic, write_json
from picollm.run_dir import RunDir, StageDir
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch
from picollm_cli.prepare import Prepared, check_kind, note

if TYPE_CHECKING:
    from picollm.config.recipe import Source, TrainRecipe, TrainRuntime
    from picollm.data.datasets import Dataset


def prepare_pretrain(prepared: Prepared, launch: Launch = Launch()) -> StageDir:
    """Write `pretrain/config.json` and return the stage.

    Raises:
        MissingArtifact: the run has no tokenizer, or the dataset is not there.
        ConfigError: the stage has started with another recipe, or the dataset holds no text.
    """
    from picollm.hardware import detect
    from picollm.plan import pretrain_recipe
    from picollm.tokenizer.tokenizer import Tokenizer

    run, config = prepared.run, prepared.config
    require_tokenizer(run)
    tokenizer = Tokenizer.load(run.tokenizer)
    recipe = pretrain_recipe(
        config,
        detect(),
        tokenizer_vocab=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        data=_text_sources(run, config),
    )
    return _store_training(prepared, run.stage("pretrain"), recipe, launch)


def warn_of_small_vocabulary(out: Output, prepared: Prepared, found: int) -> None:
    """Say that a small text gave fewer tokens than the config asks for."""
    if found < (wanted := prepared.config.tokenizer.vocab_size):
        out.warn(
            f"the text yields {found:,} tokens, fewer than the {wanted:,} asked for; "
            "the model becomes that much smaller"
        )


def prepare_sft(prepared: Prepared, launch: Launch = Launch()) -> StageDir:
    """Write `sft/config.json` and return the stage.

    Raises:
        MissingArtifact: pretraining has not finished, or a dataset of the mixture is not there.
        ConfigError: the stage has started with another recipe, or a dataset holds no conversations.
    """
    from picollm.config.recipe import TrainRecipe
    from picollm.data.registry import TOY_WORLD_CHAT
    from picollm.hardware import detect
    from picollm.plan import sft_recipe
    from picollm.train.checkpoint_files import checkpoint_sha256

    run, config = prepared.run, prepared.config
    pretrain = require_trained(run, "pretrain")
    parts = [(part.dataset, part.weight) for part in config.sft.mix] or [(TOY_WORLD_CHAT, 1.0)]
    datasets = [_dataset(name, "conversations", "sft.mix", run) for name, _ in parts]
    sources = tuple(_source(dataset, weight) for dataset, (_, weight) in zip(datasets, parts, strict=True))
    stage = run.stage("sft")
    recipe = sft_recipe(
        config,
        detect(),
        TrainRecipe.model_validate(pretrain.read_config()["recipe"]),
        data=sources,
        init_from=checkpoint_sha256(pretrain)[1],
        num_tokens=None if config.sft.steps else _conversation_tokens(stage, run, datasets, sources),
    )
    return _store_training(prepared, stage, recipe, launch)


def prepare_eval(run: RunDir, stage: str, suite: str) -> StageDir:
    """Write `eval/STAGE-SUITE/config.json` for the newest checkpoint of a finished training stage.

    Args:
        stage: `pretrain` or `sft`.
        suite: `bpb`, `samples` or `chat`.

    Raises:
        MissingArtifact: that stage has not finished.
        ConfigError: no such suite.
    """
    from pydantic import ValidationError

    from picollm.config.recipe import EvalRecipe
    from picollm.config.resolve import resolve_existing
    from picollm.hardware import detect
    from picollm.plan import eval_runtime
    from picollm.train.checkpoint_files import checkpoint_sha256

    config = resolve_existing(run.read_config()).config
    trained = require_trained(run, stage)
    step, sha256 = checkpoint_sha256(trained)
    try:
        recipe = EvalRecipe(
            suite=suite,  # type: ignore[arg-type]
            source=stage,
            checkpoint_sha256=sha256,
            step=step,
            data=_text_sources(run, config),
            questions=config.eval.questions,
            max_new_tokens=config.eval.max_new_tokens,
            bpb_tokens=config.eval.bpb_tokens,
            seed=config.seed,
        )
    except ValidationError:
        raise ConfigError(
            f"there is no suite `{suite}`", cause="suites are `bpb`, `samples` and `chat`", hint="choose one of them"
        ) from None
    runtime = eval_runtime(config, detect())
    if config.train.threads is None:
        runtime = runtime.model_copy(update={"threads": trained.read_config()["runtime"]["threads"]})
    evaluation = run.eval_stage(stage, suite)
    _write_stage(evaluation, "eval", recipe.model_dump(mode="json"), runtime.model_dump(mode="json"))
    return evaluation


def suites_for(run: RunDir, stage: str) -> list[str]:
    """Suites that apply to a trained stage; `chat` asks the toy world's questions, so fine-tuning must have seen them.

    Args:
        stage: a training stage that has finished.
    """
    from picollm.data.registry import TOY_WORLD_CHAT

    suites = ["bpb", "samples"]
    if stage != "pretrain":
        sources = run.stage("sft").read_config()["recipe"]["data"]
        suites += ["chat"] if any(source["dataset"] == TOY_WORLD_CHAT for source in sources) else []
    return suites


def say_sft_sources(out: Output, prepared: Prepared) -> None:
    """Tell somebody who named no conversations whose they are."""
    if not prepared.config.sft.mix:
        out.note("sft: no `[[sft.mix]]` in the config, so the conversations are the toy world's")


def require_tokenizer(run: RunDir) -> None:
    """Raises MissingArtifact when the run has no tokenizer."""
    if not (run.tokenizer / "tokenizer.json").is_file():
        raise MissingArtifact(
            f"no tokenizer in run `{run.name}`",
            cause="`tokenizer/tokenizer.json` does not exist",
            hint=f"make it with `picollm tokenizer train --run {run.name}`",
        )


def require_trained(run: RunDir, name: str) -> StageDir:
    """The training stage of that name, which must have finished.

    Raises:
        MissingArtifact: it has not.
    """
    stage = run.stage(name)
    if stage.record() is None:
        begun = "has not finished" if stage.has_checkpoint() else "has not run"
        raise MissingArtifact(
            f"run `{run.name}` has no model from `{name}`",
            cause=f"the stage {begun}",
            hint=f"{'finish' if stage.has_checkpoint() else 'make'} it with `picollm {name} --run {run.name}`",
        )
    return stage


def _dataset(name: str, kind: str, key: str, run: RunDir) -> Dataset:
    from picollm.data.toy_datasets import ensure

    dataset = ensure(name, keep=run.dataset_hashes())
    if dataset.is_downloaded:
        dataset.rows()  # before a worker starts: all of it is here, and what was touched since it came is hashed again
    check_kind(key, name, dataset.kind, kind)
    return dataset


def _text_sources(run: RunDir, config: RunConfig) -> tuple[Source, ...]:
    """The datasets that pretraining reads, as they are now."""
    key = "data.mix" if config.data.mix else "data.dataset"
    return tuple(_source(_dataset(name, "text", key, run), weight) for name, weight in config.data.sources)


def _source(dataset: Dataset, weight: float = 1.0) -> Source:
    from picollm.config.recipe import Source

    return Source(dataset=dataset.name, sha256=dataset.sha256, weight=weight)


def _conversation_tokens(stage: StageDir, run: RunDir, datasets: list[Dataset], sources: tuple[Source, ...]) -> int:
    """Tokens of one pass over the mixture; counted once, later read from the stored recipe."""
    if stored := _stored(stage):
        recipe = stored["recipe"]
        if recipe["data"] == [source.model_dump(mode="json") for source in sources]:
            return recipe["steps"] * recipe["batch_tokens"]
    from picollm.tokenizer.chat_format import render
    from picollm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(run.tokenizer)
    return sum(len(render(tokenizer, talk)[0]) for dataset in datasets for talk in dataset.conversations("train"))


def _stored(stage: StageDir) -> dict[str, Any] | None:
    return stage.read_prepared() if stage.config_path.is_file() else None


def _store_training(prepared: Prepared, stage: StageDir, recipe: TrainRecipe, launch: Launch) -> StageDir:
    """Keep what was decided for another machine before, derive the runtime, and write the stage's config."""
    from picollm.hardware import detect
    from picollm.plan import check_fp8, keep_precision, train_runtime

    machine, stored = detect(), _stored(stage)
    if stored:
        recipe = keep_precision(recipe, stored["recipe"], prepared.config)
    if recipe.fp8:
        check_fp8(machine, recipe.dtype)
    runtime = train_runtime(prepared.config, machine, recipe, ranks=launch.ranks, ranks_per_node=launch.nproc)
    if prepared.config.train.threads is None and (earlier := stored or _stored(prepared.run.stage("pretrain"))):
        runtime = _keep_threads(runtime, earlier["runtime"])
    _write_stage(stage, recipe.stage, recipe.model_dump(mode="json"), runtime.model_dump(mode="json"))
    return stage


def _keep_threads(runtime: TrainRuntime, earlier: dict[str, Any]) -> TrainRuntime:
    """Threads change the order of sums, so they stay while the ranks do."""
    if earlier["ranks"] != runtime.ranks:
        return runtime
    return runtime.model_copy(update={"threads": earlier["threads"]})


def _shown(value: Any) -> Any:
    """A recipe's value in an error: lists of datasets as words, everything else with all its digits."""
    from picollm.report.text import plain

    return plain(value) if isinstance(value, list | dict) else value


def _write_stage(stage: StageDir, name: str, recipe: dict[str, Any], runtime: dict[str, Any]) -> None:
    """Write a stage's `config.json`, unless it has started with another recipe.

    Raises:
        ConfigError: it has; names keys and values.
    """
    from picollm.config.keys import flatten

    value = {"schema": SCHEMA, "stage": name, "recipe": recipe, "runtime": runtime}
    if stored := _stored(stage):
        if stored == value:
            return
        was, now = dict(flatten(stored["recipe"])), dict(flatten(recipe))
        differing = [key for key in now.keys() | was.keys() if was.get(key) != now.get(key)]
        # Nobody changed a key that the stored recipe lacks: a newer picollm brought it.
        changed = [key for key in differing if key in was]
        if not changed and stage.is_done({"recipe": sha256_json(stored["recipe"])}):
            return  # nothing will be done, and its config goes on saying how it was
        # An evaluation has no state to protect: with another recipe it is simply made again.
        if differing and name != "eval" and stage.is_started():
            run = stage.run
            raise ConfigError(
                f"stage `{name}` of run `{run.name}` has started with another recipe",
                cause="; ".join(
                    f"`{key}` was {_shown(was.get(key, 'not there yet'))} and is {_shown(now.get(key))} now"
                    for key in sorted(differing)
                ),
                hint=f"{'undo the change' if changed else 'go on with the older picollm that began it'}, "
                f"start a new run with `--run NAME`, "
                f"or redo the stage with `picollm speedrun --run {run.name} --force {name}`",
            )
        for key, new in runtime.items():
            if (old := stored["runtime"].get(key)) != new:
                note(stage.run, stage.name, f"runtime {key}: {old} -> {new}")
                if key == "device_batch_size":  # a back-off from the old one says nothing about the new one
                    stage.runtime_path.unlink(missing_ok=True)
    _keep_dataset_records(stage.run, recipe.get("data", []))
    with disk_errors(stage.path):
        stage.path.mkdir(parents=True, exist_ok=True)
    write_json(stage.config_path, value)


def _keep_dataset_records(run: RunDir, sources: list[dict[str, Any]]) -> None:
    """Copy what describes the datasets into the run, which shall say what it was made from where they are not."""
    for source in sources:
        kept = run.kept_dataset_record(source["dataset"], source["sha256"])
        found = run.find_dataset_record(source["dataset"], source["sha256"])
        if found and found != kept:
            write_atomic(kept, found.read_bytes())
