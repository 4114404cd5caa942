"""`picollm speedrun`: every stage of a run, in order. This file is the one place where that order stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional

import typer

from picollm.data.registry import REGISTRY
from picollm.errors import ConfigError, Interrupted, MissingArtifact, did_you_mean
from picollm.events import EventWriter
from picollm.files import sha256_json
from picollm.run_dir import StageDir
from picollm.units import size
from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.downloading import announce, watch
from picollm_cli.launch import run_stage
from picollm_cli.launch_line import Launch, check_launch, parse_launch

if TYPE_CHECKING:
    from picollm.data.dataset_record import ShardFile
    from picollm.data.datasets import Dataset
    from picollm.data.download import Download
    from picollm_cli.nodes import Board
    from picollm_cli.prepare import Prepared

Figures = dict[str, Any]


class Job:
    """One speedrun at work; `begin` is called by a stage that has something to do."""

    def __init__(self, out: Output, prepared: Prepared, launch: Launch, board: Board | None) -> None:
        self.out = out
        self.prepared = prepared
        self.run = prepared.run
        self.launch = launch
        self.board = board
        self.changed = False  # by any stage so far
        self.working = False  # the current stage
        self._downloads: dict[str, Download] = {}
        self._at_end = ExitStack()
        self._events: EventWriter | None = None
        self._stage = self._title = ""

    def enter(self, stage: str, title: str) -> None:
        self._stage, self._title, self._events, self.working = stage, title, None, False

    def begin(self, *, event: bool = True) -> None:
        """Say and record that the current stage really starts; later calls do nothing."""
        if not self.working:
            self.working = self.changed = True
            self.out.note(self._title, style="name")
            if event:
                self._events = EventWriter(self.run.events_path, self._stage)
                self._events.write("stage_start")

    def end(self, *, ok: bool) -> None:
        """Record how the current stage ended, if it began."""
        if self._events is not None:
            self._events.write("stage_end", ok=ok)
            self._events.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self._at_end.close()

    def fetch(self, dataset: Dataset) -> None:
        """Begin to download what a dataset lacks; goes on beside the stages that follow."""
        from picollm.data.download import Download

        self.begin()
        announce(self.out, dataset)
        self._downloads[dataset.name] = self._at_end.enter_context(Download(dataset))

    def wait_for(self, dataset: Dataset, file: ShardFile) -> None:
        """Wait until a file is here, where it is on its way."""
        if dataset.name in self._downloads:
            self._downloads[dataset.name].wait_for(file)

    def finish_downloads(self) -> None:
        """Wait for all of them; raises what keeps one from being complete."""
        for download in self._downloads.values():
            watch(self.out, download)
        self._downloads.clear()
        self._at_end.close()  # lets go of the datasets, which another command may want to enlarge meanwhile

    def worker(
        self,
        stage: StageDir,
        module: str,
        *,
        launch: Launch,
        title: str | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> Figures:
        """Run a prepared stage unless it is done, `first` before it; returns the result in its record."""
        if not stage.is_done({"recipe": sha256_json(stage.read_config()["recipe"])}):
            self.begin()
            first()
        board = self.board if launch.nnodes > 1 else None
        return run_stage(self.out, stage, module, launch=launch, board=board, title=title)["result"]


# -- the stages -------------------------------------------------------------------------------------------------------


def make_data(job: Job) -> Figures:
    """Open the datasets. The toy world's are generated and the registry's fetched when they are not there.

    A download goes on beside the tokenizer's training; whatever comes after that waits for it.
    """
    from picollm.data.datasets import Dataset
    from picollm.data.registry import TOY_WORLD_CHAT
    from picollm.data.toy_datasets import ensure
    from picollm_cli.downloading import pin_for_run
    from picollm_cli.prepare import plan_of

    config, used = job.prepared.config, job.run.dataset_hashes()
    shares = dict(config.data.sources)
    names = [*shares, *([part.dataset for part in config.sft.mix] or [TOY_WORLD_CHAT])]
    figures = {}
    for name in dict.fromkeys(names):
        # Only a run that has not begun may decide how many shards there are.
        decides = name in REGISTRY and name in shares and not used
        dataset: Dataset | None = None
        try:
            dataset = Dataset.open(name, keep=used)
        except MissingArtifact:
            job.begin()
        if decides and (dataset is None or dataset.is_downloaded):
            tokens = plan_of(job.prepared, job.launch).pretrain.tokens * shares[name] / sum(shares.values())
            dataset = pin_for_run(name, round(tokens))
        dataset = dataset or ensure(name)
        if dataset.is_downloaded and dataset.unverified():
            job.fetch(dataset)
        figures[name] = {
            "rows": dataset.known_rows("train"),
            "validation_rows": dataset.known_rows("validation"),
            "bytes": dataset.bytes(),
        }
    return figures


def make_tokenizer(job: Job) -> Figures:
    from picollm.tokenizer.stage import train_stage
    from picollm_cli.environment import record_command
    from picollm_cli.prepare_stage import warn_of_small_vocabulary

    with ExitStack() as stack:
        update: Callable[..., None] | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal update
            if update is None:
                job.begin()
                record_command(job.run, "tokenizer")
                update = stack.enter_context(job.out.progress("tokenizer", unit="characters"))
            update(done, total)

        result = train_stage(job.run, job.prepared.config, on_progress=on_progress, wait_for=job.wait_for)["result"]
    if job.working:
        warn_of_small_vocabulary(job.out, job.prepared, result["vocab_size"])
    return result


def make_pretrain(job: Job) -> Figures:
    from picollm_cli.prepare_stage import prepare_pretrain

    stage = prepare_pretrain(job.prepared, job.launch)
    return job.worker(stage, "picollm.stages.pretrain", launch=job.launch)


def make_sft(job: Job) -> Figures:
    from picollm_cli.prepare_stage import prepare_sft, say_sft_sources

    stage = prepare_sft(job.prepared, job.launch)
    return job.worker(
        stage, "picollm.stages.sft", launch=job.launch, first=lambda: say_sft_sources(job.out, job.prepared)
    )


def make_eval(job: Job) -> Figures:
    """Score the furthest model with every suite that applies to it."""
    from picollm_cli.prepare_stage import prepare_eval, suites_for

    trained = job.run.latest_trained_stage().name
    figures: Figures = {}
    for suite in suites_for(job.run, trained):
        stage = prepare_eval(job.run, trained, suite)
        figures[suite] = job.worker(stage, "picollm.stages.eval", launch=Launch(), title=f"eval {suite}")
    return figures


def make_report(job: Job) -> Figures:
    from picollm.report.build import write_report

    path = job.run.path / "report.md"
    if job.changed or not _is_newest(path, job.run.path.rglob("STAGE.json")):
        job.begin()
        path = write_report(job.run)
    return {"path": str(path)}


def make_manifest(job: Job) -> Figures:
    """List and hash everything. Begins without an event: the list holds the run's events too."""
    from picollm.manifest import list_files, read_manifest, write_manifest

    path, names = job.run.manifest_path, list_files(job.run)
    if not job.changed and _is_newest(path, [job.run.path / name for name in names]):
        manifest = read_manifest(job.run)
        if [entry["path"] for entry in manifest["files"]] == names:
            return {"path": str(path), "files": len(names)}
    job.begin(event=False)
    return {"path": str(path), "files": len(write_manifest(job.run)["files"])}


def _is_newest(path: Path, others: Iterable[Path]) -> bool:
    """Whether a summary was written after everything it sums up, also when a crash came in between."""
    return path.is_file() and all(other.stat().st_mtime_ns <= path.stat().st_mtime_ns for other in others)


class Stage(NamedTuple):
    """A stage by name, and what makes it: skips what is done, returns figures for the last lines of the command."""

    name: str
    make: Callable[[Job], Figures]


STAGES = (
    Stage("data", make_data),
    Stage("tokenizer", make_tokenizer),
    Stage("pretrain", make_pretrain),
    Stage("sft", make_sft),
    Stage("eval", make_eval),
    Stage("report", make_report),
    Stage("manifest", make_manifest),
)
NAMES = [stage.name for stage in STAGES]


# -- the command ------------------------------------------------------------------------------------------------------


def speedrun(
    run: options.Run = None,
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Set = None,
    skip: Annotated[
        Optional[list[str]],
        typer.Option("--skip", metavar="STAGE", help="Leave a stage out; may be repeated.", show_default=False),
    ] = None,
    force: Annotated[
        Optional[str],
        typer.Option(
            "--force",
            metavar="STAGE",
            help="Redo this stage and all later ones; what they made moves to `old/`.",
            show_default=False,
        ),
    ] = None,
    launch: options.Launch = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    yes: options.Yes = False,
) -> None:
    """Run every stage, from text to a model you can talk to.

    In order: data, tokenizer, pretrain, sft, eval, report, manifest.
    Stages that are done are skipped, so the same command continues
    a run that was interrupted at any moment.
    Without a run and a preset it is the preset `demo`.

    \b
    Examples:
      picollm speedrun --preset demo
      picollm speedrun --preset demo --dry-run
      picollm speedrun --preset cpu-small --run peps --set data.dataset=peps
      picollm speedrun --run peps --force sft --set sft.steps=200
      picollm speedrun --preset d24 --run big --launch nproc=8
    """
    import os

    from picollm_cli.nodes import follow, leading
    from picollm_cli.prepare import open_run, resolve_run

    out, how = Output(json), parse_launch(launch)
    left_out = [_known_stage("--skip", name) for name in skip or []]
    redo = NAMES[NAMES.index(_known_stage("--force", force)) :] if force else []
    if not (run or preset or config or os.environ.get("PICOLLM_RUN")):
        preset = "demo"
    given = {"run": run, "preset": preset, "config": config, "sets": sets}
    if dry_run:
        from picollm_cli.dry_run import show_plan

        show_plan(out, resolve_run(**given, redo=redo), how)
        return
    if how.node_rank:
        check_launch(how)
        stages = [name for name in ("pretrain", "sft") if name not in left_out]
        follow(out, resolve_run(**given, redo=redo).run, stages, how, redo=redo)
        return
    started = time.monotonic()
    with (
        open_run(out, **given, force=redo, launch=how, yes=yes, downloads=True) as prepared,
        leading(prepared.run, how) as board,
    ):
        out.note(f"run `{prepared.run.name}` in `{prepared.run.path}`")
        with Job(out, prepared, how, board) as job:
            made = _make_all(job, left_out)
    _tell(out, prepared.run.name, prepared.run.path, made, time.monotonic() - started)


def _known_stage(option: str, name: str) -> str:
    if name in NAMES:
        return name
    raise ConfigError(
        f"`{option}` knows no stage `{name}`",
        cause=f"stages are {', '.join(f'`{known}`' for known in NAMES)}",
        hint=did_you_mean(name, NAMES, f"{option} ", otherwise="choose one of them"),
    )


def _make_all(job: Job, left_out: list[str]) -> dict[str, Figures]:
    """Run the stages in order; returns `{stage: {"state", …figures}}`."""
    made: dict[str, Figures] = {}
    for number, stage in enumerate(STAGES, 1):
        title = f"[{number}/{len(STAGES)}] {stage.name}"
        if stage.name in left_out:
            job.out.note(f"{title}: skipped")
            made[stage.name] = {"state": "skipped"}
            continue
        job.enter(stage.name, title)
        started = time.monotonic()
        try:
            if stage.name not in ("data", "tokenizer"):
                job.finish_downloads()
            figures = stage.make(job)
        except BaseException as error:
            job.end(ok=False)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"{stage.name} was stopped",
                    cause="finished stages and checkpoints are kept",
                    hint="run the same command again to continue",
                ) from error
            raise
        job.end(ok=True)
        state = "made" if job.working else "already done"
        job.out.note(f"{title}: {state}" + (f" in {time.monotonic() - started:.1f} s" if job.working else ""))
        made[stage.name] = {"state": state, **figures}
    job.finish_downloads()  # where every stage that would have waited was left out
    return made


def _tell(out: Output, run: str, path: Path, made: dict[str, Figures], seconds: float) -> None:
    """What was made, its figures, and what to do with it."""
    out.print()
    out.print(f"run `{run}` is finished after {seconds:.0f} s; everything is in {path}", style="good")
    for name, figures in made.items():
        if shown := _shown(name, figures):
            out.print(f"  {name:<10} {shown}")
    out.result({"run": run, "path": str(path), "wall_s": round(seconds, 1), "stages": made})
    trained = any(made[name]["state"] != "skipped" for name in ("pretrain", "sft"))
    if trained:
        out.hint(f'talk to it with `picollm chat --run {run}`, or once: `picollm chat --run {run} -p "Who are you?"`')


def _shown(name: str, figures: Figures) -> str:
    """One line of figures of a stage."""
    if figures["state"] == "skipped":
        return "skipped"
    if name == "data":
        counts = {key: value for key, value in figures.items() if key != "state"}
        return ", ".join(
            f"{key} {size(value['bytes'])}" if value["rows"] is None else f"{key} {value['rows']:,} rows"
            for key, value in counts.items()
        )
    if name == "tokenizer":
        return f"{figures['vocab_size']:,} tokens"
    if name in ("pretrain", "sft"):
        value = f", {figures['val_bpb']:.4f} bits per byte" if "val_bpb" in figures else ""
        return f"loss {figures['loss']:.4f}{value} after {figures['tokens']:,} tokens"
    if name == "eval":
        bpb = f"{figures['bpb']['validation']['score']:.4f} bits per byte"
        held_out = [
            f"{task.removesuffix('_held_out')} {score['score']:.2f}"
            for task, score in figures.get("chat", {}).items()
            if task.endswith("_held_out")
        ]
        return bpb + (f"; held out: {', '.join(held_out)}" if held_out else "")
    return str(figures.get("path", ""))
