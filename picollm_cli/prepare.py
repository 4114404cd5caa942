"""Make a run ready: decide which one is meant, resolve its config, check the machine, hold its lock."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from picollm.data.registry import REGISTRY
from picollm.errors import ConfigError, HostError, MissingArtifact
from picollm.events import EventWriter
from picollm.files import SCHEMA, file_stats, write_json
from picollm.locks import hold_lock
from picollm.run_dir import RunDir, expand, find_run, run_named
from picollm.units import size
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, check_launch

if TYPE_CHECKING:
    from picollm.config.schema import RunConfig
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

    A run is made only where a preset, a config file or values say what it is. It is called `--run`, else
    `$PICOLLM_RUN`, else like its preset or config file. With none of them it is the newest run.

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

    path = expand(config) if config else None
    name = run or os.environ.get("PICOLLM_RUN") or preset or (path.stem if path else None)
    # A mistyped name alone must not make a run of defaults, which would then be the newest one.
    described = bool(preset or config or sets)
    found = run_named(name) if name and create and described else find_run(name)
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
    launch: Launch = Launch(),
    yes: bool = False,
    downloads: bool = False,
) -> Iterator[Prepared]:
    """Resolve and store a run, and hold its lock for the life of the block: how a command starts work on a run.

    Args:
        force: stages that start over; their folders move to `old/` first.
        downloads: the command fetches datasets of the registry that are not there.

    Raises:
        ConfigError, MissingArtifact, IntegrityError: as in `resolve_run`; or a new run's dataset is not there.
        ConfigError, HostError: as in `check_launch` and `check_host`, or another command holds the run.
    """

    def resolve() -> Prepared:
        return resolve_run(run=run, preset=preset, config=config, sets=sets, create=create, redo=force)

    # Everything that can be refused is refused before the lock file makes the folder.
    check_launch(launch)
    prepared = resolve()
    _check_datasets(prepared, downloads, all_of_them=prepared.new or bool(force))
    check_host(out, prepared, launch, yes=yes)
    with using_run(prepared.run):
        prepared = resolve()
        for moved in prepared.run.move_to_old([path for name in force for path in STAGE_PATHS.get(name, (name,))]):
            out.note(f"moved aside: `{moved.relative_to(prepared.run.path)}`")
        store_run(prepared)
        yield prepared


def _check_datasets(prepared: Prepared, downloads: bool, *, all_of_them: bool) -> None:
    """Look for the datasets before a run is made of them, or what they made before moves aside.

    Args:
        all_of_them: or only those that the run did not name before: fine-tuning reads no text, which may be gone.

    Raises:
        ConfigError, MissingArtifact, IntegrityError: for the first one that the run cannot be trained on.
    """
    from picollm.config.resolve import resolve_existing
    from picollm.data.datasets import Dataset
    from picollm.data.registry import TOY_NAMES, TOY_WORLD_CHAT

    used, wanted = prepared.run.dataset_hashes(), _datasets_of(prepared.config)
    if not all_of_them:
        before = _datasets_of(resolve_existing(prepared.run.read_config()).config)
        wanted = [dataset for dataset in wanted if dataset not in before]
    for key, name, kind in wanted:
        if name in TOY_NAMES:  # generated when they are needed
            check_kind(key, name, "conversations" if name == TOY_WORLD_CHAT else "text", kind)
        elif not (downloads and name in REGISTRY):  # fetched when they are needed
            check_kind(key, name, Dataset.open(name, keep=used).kind, kind)


def _datasets_of(config: RunConfig) -> list[tuple[str, str, str]]:
    """(key of the config, name, kind) of each dataset that a run is made of."""
    text_key = "data.mix" if config.data.mix else "data.dataset"
    wanted = [(text_key, name, "text") for name, _ in config.data.sources]
    return wanted + [("sft.mix", part.dataset, "conversations") for part in config.sft.mix]


def check_kind(key: str, name: str, found: str, needed: str) -> None:
    """Raises ConfigError when a dataset holds `found`, `text` or `conversations`, where `key` needs the other."""
    if found != needed:
        raise ConfigError(
            f"`{key}` cannot be `{name}`",
            cause=f"it needs a dataset of {needed}, and this one holds {found}",
            hint="`picollm data list` shows which is which",
        )


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


def _refuse_frozen(run: RunDir, before: RunConfig, now: RunConfig, redo: Collection[str]) -> None:
    from picollm.config.resolve import changed_recipe_keys

    started = [name for name in ("tokenizer", "pretrain", "sft") if name not in redo and run.stage(name).is_started()]
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


def plan_of(prepared: Prepared, launch: Launch = Launch()) -> Plan:
    """What the whole run will take on this machine; knows the dataset's size when it is there."""
    from picollm.data.datasets import Dataset
    from picollm.hardware import detect
    from picollm.plan import make_plan

    used, pretrain = prepared.run.dataset_hashes(), prepared.run.stage("pretrain")

    def made(chars: int | None, missing: int) -> Plan:
        return make_plan(
            prepared.config,
            detect(),
            ranks=launch.ranks,
            ranks_per_node=launch.nproc,
            dataset_chars=chars,
            missing_bytes=missing,
            stored=pretrain.read_prepared()["recipe"] if pretrain.config_path.is_file() else None,
        )

    try:
        found = [Dataset.open(name, keep=used) for name, _ in prepared.config.data.sources]
    except MissingArtifact:
        return made(None, 0)
    chars = sum(dataset.chars("train") for dataset in found)
    missing = sum(file.bytes for dataset in found for file in dataset.missing())
    plan = made(chars, missing)
    known = REGISTRY.get(found[0].name)
    if known is None or len(found) > 1 or used or not found[0].is_downloaded:
        return plan
    # A run that has not begun takes as many shards as its tokens need.
    if (more := known.shards_for(plan.pretrain.tokens) - len(found[0].of("train"))) > 0:
        return made(chars + more * known.shard_chars, missing + more * known.shard_bytes)
    return plan


def disk_needed(plan: Plan, run: RunDir | None) -> int:
    """Bytes that must be free for a run, margins included; what an existing run has written already needs no room."""
    used = sum(stat.st_size for stat in file_stats(run.path)) if run else 0
    return max(0, round(plan.disk_bytes * (1 + DISK_MARGIN_SHARE)) - used) + DISK_MARGIN_BYTES


def check_host(out: Output, prepared: Prepared, launch: Launch = Launch(), *, yes: bool = False) -> None:
    """Refuse before anything is made what would fail in the middle.

    Raises:
        HostError: too little disk; or too little memory, unless somebody says `--yes`.
    """
    from picollm.hardware import detect, disk_free

    plan, machine, run = plan_of(prepared, launch), detect(), prepared.run
    needed = disk_needed(plan, run)
    if (free := disk_free(run.path)) < needed:
        raise HostError(
            f"run `{run.name}` does not fit on the disk",
            cause=f"it needs about {size(needed)} under `{run.base}`, where {size(free)} are free",
            hint="free room, or set PICOLLM_BASE_DIR to a directory on a larger disk",
        )
    room = min((gpu.memory_bytes for gpu in machine.gpus), default=machine.memory_bytes // launch.nproc)
    if plan.memory_bytes > room:
        question = (
            f"a training process needs about {size(plan.memory_bytes)} of memory and {size(room)} are there; go on?"
        )
        if not out.confirm(question, yes=yes):
            raise HostError(
                f"run `{run.name}` does not fit in memory",
                cause=f"about {size(plan.memory_bytes)} are needed, {size(room)} are there",
                hint="lower `model.depth` or `train.device_batch_size`",
            )
