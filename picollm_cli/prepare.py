"""Make a run and its stages ready: resolve, check, write `config.json`; nothing is trained here.

A stage's recipe is immutable once the stage has a checkpoint. What depends on the machine (compute type, threads) is
decided when a stage is first prepared and kept, so that a run that moves or resumes stays the same run.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from picollm.errors import ConfigError, HostError, MissingArtifact
from picollm.events import EventWriter
from picollm.run_dir import SCHEMA, RunDir, StageDir, disk_errors, find_run, hold_lock, run_named, write_json
from picollm_cli.console import Output

if TYPE_CHECKING:
    from picollm.config.recipe import Source, TrainRecipe, TrainRuntime
    from picollm.config.schema import RunConfig
    from picollm.data.datasets import Dataset
    from picollm.plan import Plan

# Room beyond the estimate: logs, reports, and a temporary checkpoint beside the ones that are kept.
DISK_MARGIN_BYTES = 256 * 2**20
DISK_MARGIN_SHARE = 0.1
# What a stage leaves in the run's folder, where that is not one folder of its name.
STAGE_PATHS = {
    "data": (),
    "report": ("report.md", "report.html", "report.json", "plots"),
    "manifest": ("manifest.json",),
}
# Which stages a section of the config decides; a stage that has started freezes its sections.
READERS: dict[str, tuple[str, ...]] = {
    "seed": ("pretrain", "sft"),
    "data": ("tokenizer", "pretrain"),
    "tokenizer": ("tokenizer", "pretrain"),
    "model": ("pretrain", "sft"),
    "train": ("pretrain", "sft"),
    "sft": ("sft",),
    "eval": (),
}


class Prepared(NamedTuple):
    """A run as this command means it, resolved; `new` when nothing of it is on disk before."""

    run: RunDir
    preset: str
    config: RunConfig
    sources: dict[str, str]
    new: bool


# -- runs -------------------------------------------------------------------------------------------------------------


def resolve_run(
    *,
    run: str | None,
    preset: str | None,
    config: str | None,
    sets: Collection[str] | None = (),
    create: bool = True,
    redo: Collection[str] = (),
) -> Prepared:
    """Decide which run is meant and what its config is; reads only.

    A new run is called `--run`, else `$PICOLLM_RUN`, else like its preset or config file. With none of them it is the
    newest run.

    Args:
        config: path of a TOML file.
        create: whether a run that is not there may be made.
        redo: stages that will start over, which freeze nothing.

    Raises:
        ConfigError: unknown preset, key or value; or values that differ from those an existing run has started with.
        MissingArtifact: the run is not there and may not be made.
        IntegrityError: the run's `config.json` is torn, or of another version.
    """
    from picollm.config.resolve import resolve, resolve_existing

    path = Path(config).expanduser() if config else None
    name = run or os.environ.get("PICOLLM_RUN") or preset or (path.stem if path else None)
    found = run_named(name) if name and create else find_run(name)
    if not found.exists():
        made = resolve(preset=preset, config_path=path, sets=tuple(sets or ()))
        return Prepared(found, made.preset, made.config, made.sources, new=True)
    stored = found.read_config()
    if preset and preset != stored.get("preset"):
        raise ConfigError(
            f"run `{found.name}` was made with another preset",
            cause=f"it was `{stored.get('preset')}`, now `{preset}` is given",
            hint=f"leave `--preset` out to continue it, or start a new run: `--preset {preset} --run NAME`",
        )
    before = resolve_existing(stored)
    now = resolve_existing(stored, config_path=path, sets=tuple(sets or ()))
    _refuse_frozen(found, before.config, now.config, redo)
    return Prepared(found, now.preset, now.config, now.sources, new=False)


def prepare_run(
    out: Output,
    *,
    run: str | None,
    preset: str | None,
    config: str | None,
    sets: Collection[str] | None = (),
    create: bool = True,
    redo: Collection[str] = (),
    ranks: int = 1,
    yes: bool = False,
) -> Prepared:
    """Resolve a run, check that this machine has room for it, and store its config, without holding its lock.

    Raises:
        ConfigError, MissingArtifact, IntegrityError: as in `resolve_run`.
        HostError: too little disk or memory, or the base directory cannot be written.
    """
    prepared = resolve_run(run=run, preset=preset, config=config, sets=sets, create=create, redo=redo)
    check_host(out, prepared, ranks=ranks, yes=yes)
    store_run(prepared)
    return prepared


@contextlib.contextmanager
def open_run(
    out: Output,
    *,
    run: str | None,
    preset: str | None,
    config: str | None,
    sets: Collection[str] | None = (),
    create: bool = True,
    force: Collection[str] = (),
    ranks: int = 1,
    yes: bool = False,
) -> Iterator[Prepared]:
    """Resolve and store a run, and hold its lock for the life of the block: how a command starts work on a run.

    Args:
        force: stages that start over; their folders move to `old/` first.

    Raises:
        ConfigError, MissingArtifact, IntegrityError: as in `resolve_run`.
        HostError: as in `check_host`, or another command holds the run.
    """

    def resolve() -> Prepared:
        return resolve_run(run=run, preset=preset, config=config, sets=sets, create=create, redo=force)

    # Everything that can be refused is refused before the lock file makes the folder.
    prepared = resolve()
    check_host(out, prepared, ranks=ranks, yes=yes)
    with using_run(prepared.run):
        prepared = resolve()
        for moved in prepared.run.move_to_old([path for name in force for path in STAGE_PATHS.get(name, (name,))]):
            out.note(f"moved aside: `{moved.relative_to(prepared.run.path)}`")
        store_run(prepared)
        yield prepared


def store_run(prepared: Prepared) -> None:
    """Write `environment.json` of a new run, and `config.json` where it says something new."""
    run = prepared.run
    value = {
        "schema": SCHEMA,
        "preset": prepared.preset,
        "sources": prepared.sources,
        "config": prepared.config.model_dump(mode="json"),
    }
    if prepared.new:
        from picollm_cli.environment import environment

        write_json(run.environment_path, environment())
    elif run.read_config() == value:
        return
    else:
        note(run, "run", "config changed; what stages have started with stays as it is")
    # Last, because a run exists from here on.
    write_json(run.config_path, value)


@contextlib.contextmanager
def using_run(run: RunDir) -> Iterator[None]:
    """Hold the run's lock while a command prepares or runs stages; SIGTERM ends the block like Ctrl-C.

    Raises:
        HostError: another command holds it.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with hold_lock(run.lock_path, f"run `{run.name}`"):
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def note(run: RunDir, stage: str, text: str) -> None:
    """Add a note to the run's own events; only the holder of the run's lock does."""
    events = EventWriter(run.events_path, stage)
    events.write("note", text=text, level="info")
    events.close()


def is_started(stage: StageDir) -> bool:
    """True when something was made that its recipe decided."""
    return stage.has_checkpoint() or stage.record() is not None


def _refuse_frozen(run: RunDir, before: RunConfig, now: RunConfig, redo: Collection[str]) -> None:
    from picollm.config.resolve import changed_recipe_keys

    started = [name for name in ("tokenizer", "pretrain", "sft") if name not in redo and is_started(run.stage(name))]
    frozen, causes = [], []
    for key, old, new in changed_recipe_keys(before, now):
        if readers := [name for name in started if name in READERS[key.partition(".")[0]]]:
            frozen += readers
            causes.append(f"`{key}` is {old} in the run and {new} now")
    if causes:
        first = min(frozen, key=started.index)
        raise ConfigError(
            f"stage `{first}` of run `{run.name}` has started with other values",
            cause="; ".join(causes),
            hint="leave them out to continue, start a new run with `--run NAME`, "
            f"or redo the stage with `picollm speedrun --run {run.name} --force {first} …`",
        )


# -- the machine ------------------------------------------------------------------------------------------------------


def plan_of(prepared: Prepared, *, ranks: int = 1) -> Plan:
    """What the whole run will take on this machine; knows the dataset's size when it is there."""
    from picollm.data.datasets import Dataset
    from picollm.hardware import detect
    from picollm.plan import make_plan

    try:
        chars = Dataset.open(prepared.config.data.dataset).chars("train")
    except MissingArtifact:
        chars = None
    return make_plan(prepared.config, detect(), ranks=ranks, dataset_chars=chars)


def check_host(out: Output, prepared: Prepared, *, ranks: int = 1, yes: bool = False) -> None:
    """Refuse before anything is made what would fail in the middle.

    Raises:
        HostError: too little disk; or too little memory, unless somebody says `--yes`.
    """
    from picollm.hardware import detect, disk_free

    plan, machine, run = plan_of(prepared, ranks=ranks), detect(), prepared.run
    used = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) if run.path.is_dir() else 0
    needed = max(0, round(plan.disk_bytes * (1 + DISK_MARGIN_SHARE)) - used) + DISK_MARGIN_BYTES
    if (free := disk_free(run.path)) < needed:
        raise HostError(
            f"run `{run.name}` does not fit on the disk",
            cause=f"it needs about {needed / 2**30:.2f} GiB under `{run.base}`, where {free / 2**30:.2f} GiB are free",
            hint="free room, or set PICOLLM_BASE_DIR to a directory on a larger disk",
        )
    room = min((gpu.memory_bytes for gpu in machine.gpus), default=machine.memory_bytes // ranks)
    if plan.memory_bytes > room:
        question = (
            f"a training process needs about {plan.memory_bytes / 2**30:.1f} GiB of memory and "
            f"{room / 2**30:.1f} GiB are there; go on?"
        )
        if not out.confirm(question, yes=yes):
            raise HostError(
                f"run `{run.name}` does not fit in memory",
                cause=f"about {plan.memory_bytes / 2**30:.1f} GiB are needed, {room / 2**30:.1f} GiB are there",
                hint="lower `model.depth` or `train.device_batch_size`",
            )


# -- stages -----------------------------------------------------------------------------------------------------------


def prepare_pretrain(prepared: Prepared, *, ranks: int = 1) -> StageDir:
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
    source = _source(_dataset(config.data.dataset, "text", "data.dataset", run))
    recipe = pretrain_recipe(
        config, detect(), tokenizer_vocab=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256, data=(source,)
    )
    return _store_training(prepared, run.stage("pretrain"), recipe, ranks)


def prepare_sft(prepared: Prepared, *, ranks: int = 1) -> StageDir:
    """Write `sft/config.json` and return the stage.

    Raises:
        MissingArtifact: pretraining has not finished, or a dataset of the mixture is not there.
        ConfigError: the stage has started with another recipe, or a dataset holds no conversations.
    """
    from picollm.config.recipe import TrainRecipe
    from picollm.data.datasets import TOY_WORLD_CHAT
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
    return _store_training(prepared, stage, recipe, ranks)


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
            data=_source(_dataset(config.data.dataset, "text", "data.dataset", run)),
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


def used_toy_world(run: RunDir) -> bool:
    """Whether the run's SFT saw the toy world's conversations, whose questions the `chat` suite asks."""
    from picollm.data.datasets import TOY_WORLD_CHAT

    stage = run.stage("sft")
    if stage.record() is None:
        return False
    return any(source["dataset"] == TOY_WORLD_CHAT for source in stage.read_config()["recipe"]["data"])


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
    from picollm.data.datasets import ensure

    dataset = ensure(name)
    if dataset.kind != kind:
        raise ConfigError(
            f"`{key}` cannot be `{name}`",
            cause=f"it needs a dataset of {kind}, and this one holds {dataset.kind}",
            hint="`picollm data list` shows which is which",
        )
    return dataset


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
    return stage.read_config() if stage.config_path.is_file() else None


def _store_training(prepared: Prepared, stage: StageDir, recipe: TrainRecipe, ranks: int) -> StageDir:
    """Keep what was decided for this machine before, derive the runtime, and write the stage's config."""
    from picollm.hardware import detect
    from picollm.plan import train_runtime

    config, stored = prepared.config, _stored(stage)
    if stored and config.train.dtype == "auto":
        kept = {key: stored["recipe"][key] for key in ("dtype", "dtype_reason")}
        recipe = recipe.model_copy(update=kept)
    runtime = train_runtime(config, detect(), recipe, ranks=ranks)
    if config.train.threads is None and (earlier := stored or _stored(prepared.run.stage("pretrain"))):
        runtime = _keep_threads(runtime, earlier["runtime"])
    _write_stage(stage, recipe.stage, recipe.model_dump(mode="json"), runtime.model_dump(mode="json"))
    return stage


def _keep_threads(runtime: TrainRuntime, earlier: dict[str, Any]) -> TrainRuntime:
    """Threads change the order of sums, so they stay while the ranks do."""
    if earlier["ranks"] != runtime.ranks:
        return runtime
    return runtime.model_copy(update={"threads": earlier["threads"]})


def _write_stage(stage: StageDir, name: str, recipe: dict[str, Any], runtime: dict[str, Any]) -> None:
    """Write a stage's `config.json`, unless it has started with another recipe.

    Raises:
        ConfigError: it has; names keys and values.
    """
    from picollm.config.resolve import flatten

    value = {"schema": SCHEMA, "stage": name, "recipe": recipe, "runtime": runtime}
    if stored := _stored(stage):
        if stored == value:
            return
        was, now = dict(flatten(stored["recipe"])), dict(flatten(recipe))
        differing = [key for key in now.keys() | was.keys() if was.get(key) != now.get(key)]
        # An evaluation has no state to protect: with another recipe it is simply made again.
        if differing and name != "eval" and is_started(stage):
            run = stage.run
            raise ConfigError(
                f"stage `{name}` of run `{run.name}` has started with another recipe",
                cause="; ".join(f"`{key}` was {was.get(key)} and is {now.get(key)} now" for key in sorted(differing)),
                hint=f"undo the change, start a new run with `--run NAME`, "
                f"or redo the stage with `picollm speedrun --run {run.name} --force {name}`",
            )
        for key, new in runtime.items():
            if (old := stored["runtime"].get(key)) != new:
                note(stage.run, stage.name, f"runtime {key}: {old} -> {new}")
    with disk_errors(stage.path):
        stage.path.mkdir(parents=True, exist_ok=True)
    write_json(stage.config_path, value)
