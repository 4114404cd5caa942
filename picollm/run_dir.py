"""Every path under the base directory, and the records of stages.

A run is a folder of stage folders. A stage is done when its `STAGE.json`, written last, matches its inputs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact, did_you_mean
from picollm.files import SCHEMA, disk_errors, free_name, read_fields, read_json, sha256_file, write_json

NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
# The order in which later stages depend on earlier ones; readers of "the latest stage" walk it backwards.
TRAINING_STAGES = ("pretrain", "sft", "rl")
# `train/checkpoint_files.py` writes them; here because whether a stage has started depends on them.
CHECKPOINT_PATTERN = re.compile(r"^step_([0-9]{6}|[1-9][0-9]{6,})$")
CHECKPOINT_FILES = ("model.safetensors", "meta.json", "SHA256SUMS")


def base_dir() -> Path:
    """`$PICOLLM_BASE_DIR`, else the user's data directory; holds datasets, caches and runs.

    Raises:
        HostError: it is to be found from a home directory, and there is none.
    """
    if configured := os.environ.get("PICOLLM_BASE_DIR"):
        return expand(configured).absolute()
    return expand(os.environ.get("XDG_DATA_HOME") or "~/.local/share").absolute() / "picollm"


def expand(path: str) -> Path:
    """The path with `~` replaced by the home directory.

    Raises:
        HostError: there is no home directory, neither in HOME nor in the list of users.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise HostError(
            f"there is no home directory for `{path}`",
            cause="HOME is not set and this user has no entry in the list of users",
            hint="set HOME, or PICOLLM_BASE_DIR to a directory you can write",
        ) from error


def check_name(kind: str, name: str) -> str:
    """Return `name` when it is safe as a folder name.

    Raises:
        ConfigError: it holds a separator, starts with a dot, or is empty or longer than 100 characters.
    """
    if not NAME_PATTERN.match(name):
        raise ConfigError(
            f"`{name}` cannot be the name of a {kind}",
            cause="a name is letters, digits, `.`, `_` and `-`, starts with a letter or digit, and has at most 100",
            hint=f"choose a name such as `my-{kind}`",
        )
    return name


# -- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageDir:
    """One stage's folder: what it was asked (`config.json`), what happened (events), what came out (record)."""

    path: Path

    @property
    def run(self) -> RunDir:
        inside_eval = self.path.parent.name == "eval"
        return RunDir(self.path.parent.parent if inside_eval else self.path.parent)

    @property
    def name(self) -> str:
        """Relative to the run: `pretrain`, `sft`, `eval/sft-chat`."""
        return self.path.relative_to(self.run.path).as_posix()

    @property
    def _command(self) -> str:
        """The subcommand that runs it, which is also what `--force` calls it."""
        return self.name.partition("/")[0]

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def runtime_path(self) -> Path:
        return self.path / "runtime.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def record_path(self) -> Path:
        return self.path / "STAGE.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        return self.path / "latest"

    @property
    def log_dir(self) -> Path:
        return self.path / "log"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def pid_path(self) -> Path:
        return self.path / "pid"

    @property
    def launcher_path(self) -> Path:
        return self.path / "launcher"

    @property
    def stop_path(self) -> Path:
        return self.path / "STOP"

    @property
    def tokens_path(self) -> Path:
        """How rank 0 tells the other ranks that the token cache is there."""
        return self.path / "tokens"

    def read_config(self) -> dict[str, Any]:
        """`{"schema", "stage", "recipe", "runtime"}`, with `runtime.json` laid over its runtime.

        Raises:
            MissingArtifact: the stage was never prepared.
            IntegrityError: torn, or of another version.
        """
        config = self.read_prepared()
        with contextlib.suppress(FileNotFoundError):
            changed = read_json(self.runtime_path, hint=f"remove it: `{self.config_path.name}` holds the first values")
            config["runtime"] = config["runtime"] | (changed if isinstance(changed, dict) else {})
        return config

    def read_prepared(self) -> dict[str, Any]:
        """The same as it was prepared: without `runtime.json`, which the worker wrote."""
        redo = f"restore it, or redo the stage with `picollm speedrun --run {self.run.name} --force {self._command}`"
        try:
            return read_fields(self.config_path, {"recipe": dict, "runtime": dict}, hint=redo)
        except FileNotFoundError:
            command = f"picollm {self._command} --run {self.run.name}"
            raise MissingArtifact(
                f"stage `{self.name}` of run `{self.run.name}` has no config",
                cause=f"`{self.config_path}` does not exist",
                hint=f"prepare it with `{command}`",
            ) from None

    def finished_steps(self) -> list[int]:
        """Steps of the checkpoints that were committed, ascending; some may have been damaged since.

        A folder that only has the name of one and none of its files is not a checkpoint.
        """
        if not self.checkpoints.is_dir():
            return []
        named = {path: CHECKPOINT_PATTERN.match(path.name) for path in self.checkpoints.iterdir()}
        return sorted(
            int(match[1])
            for path, match in named.items()
            if match and any((path / name).is_file() for name in CHECKPOINT_FILES)
        )

    def has_checkpoint(self) -> bool:
        return bool(self.finished_steps())

    def is_started(self) -> bool:
        """True when something is there that its recipe decided."""
        return self.has_checkpoint() or self.record() is not None

    def record(self) -> dict[str, Any] | None:
        """The stage's record, or None when it has not finished.

        Raises:
            IntegrityError: torn, edited, or of another version.
        """
        again = f"remove it and run `picollm speedrun --run {self.run.name}`: the stage goes on from what it has saved"
        try:
            record = read_fields(self.record_path, {"inputs": dict, "outputs": dict, "result": dict}, hint=again)
        except (FileNotFoundError, NotADirectoryError):  # below a file there is no stage either
            return None
        for name, entry in record["outputs"].items():
            if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
                raise IntegrityError(
                    f"`{self.record_path}` is torn or was edited",
                    cause=f"its output `{name}` has no size or no hash",
                    hint=again,
                )
        return record

    def read_results(self) -> dict[str, Any]:
        """An evaluation's `results.json`: `{"schema", "run", "stage", "step", "suites"}`.

        Raises:
            IntegrityError: torn, edited, or of another version.
            FileNotFoundError: it was not written.
        """
        again = f"remove `{self.path}` and run `picollm eval --run {self.run.name}` again"
        return read_fields(self.path / "results.json", {"stage": str, "step": int, "suites": dict}, hint=again)

    def write_record(self, inputs: dict[str, str], outputs: list[Path], result: dict[str, Any]) -> dict[str, Any]:
        """Hash the outputs and write `STAGE.json`: from here on the stage is done.

        Args:
            inputs: name -> sha256 of everything that decided the outputs.
            outputs: files under this folder.
            result: the figures a reader wants first (final loss, rows, vocabulary …).
        """
        from picollm import __version__

        files = {
            path.relative_to(self.path).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(outputs)
        }
        record = {
            "schema": SCHEMA,
            "stage": self.name,
            "picollm": __version__,
            "inputs": inputs,
            "outputs": files,
            "result": result,
        }
        write_json(self.record_path, record)
        return record

    def is_done(self, inputs: dict[str, str]) -> bool:
        """True when the record matches `inputs` and every output is there with its recorded size."""
        record = self.record()
        if record is None or record["inputs"] != inputs:
            return False
        for name, entry in record["outputs"].items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return False
        return True


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDir:
    """`BASE/runs/NAME`, the folder that holds one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def base(self) -> Path:
        return self.path.parent.parent

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def nodes_path(self) -> Path:
        """Where the command on node 0 tells those on other nodes what to join."""
        return self.path / "nodes"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def stage(self, name: str) -> StageDir:
        return StageDir(self.path / name)

    def eval_stage(self, stage: str, suite: str) -> StageDir:
        return StageDir(self.path / "eval" / f"{stage}-{suite}")

    def exists(self) -> bool:
        return self.config_path.is_file()

    def read_config(self) -> dict[str, Any]:
        """`{"schema", "preset", "sources", "config"}` as resolved when the run was made.

        Raises:
            IntegrityError: torn, or of another version.
        """
        return read_fields(
            self.config_path,
            {"preset": str, "sources": dict, "config": dict},
            hint="restore it from a copy, or start a new run with `--run NAME`",
        )

    def dataset_hashes(self) -> set[str]:
        """sha256 of every dataset that a stage of this run was prepared with, the tokenizer included.

        Raises:
            IntegrityError: a stage's config or record is torn, or of another version.
        """
        tokenizer = StageDir(self.tokenizer).record() or {"inputs": {}}
        found = set(tokenizer["inputs"].values())
        for stage in map(self.stage, TRAINING_STAGES):
            if stage.config_path.is_file():
                found |= {source["sha256"] for source in stage.read_config()["recipe"].get("data", [])}
        return found

    def kept_dataset_record(self, name: str, sha256: str) -> Path:
        """Where the run keeps the record (`dataset.json`) of a dataset that a stage of it was made from."""
        return self.path / "datasets" / f"{name}-{sha256[:12]}.json"

    def find_dataset_record(self, name: str, sha256: str) -> Path | None:
        """The record of that hash: the run's own copy, else that of the base directory; None where there is none."""
        folder = datasets_dir(self.base) / name
        # Of a download with more shards by now, the record of fewer stays in `older`.
        places = (self.kept_dataset_record(name, sha256), folder / "dataset.json", *sorted(folder.glob("older/*.json")))
        return next((path for path in places if path.is_file() and sha256_file(path) == sha256), None)

    def latest_trained_stage(self) -> StageDir:
        """The furthest training stage that has finished: what `chat` and `eval` use unless told.

        Raises:
            MissingArtifact: none has.
        """
        for name in reversed(TRAINING_STAGES):
            if (stage := self.stage(name)).record() is not None:
                return stage
        raise MissingArtifact(
            f"run `{self.name}` has no trained model yet",
            cause="no training stage of it has finished",
            hint=f"train one with `picollm speedrun --run {self.name}`",
        )

    def move_to_old(self, names: list[str]) -> list[Path]:
        """Move stage folders into `old/`, so that `--force` deletes nothing. Returns where they went."""
        moved = []
        for name in names:
            source = self.path / name
            if not source.exists():
                continue
            target = free_name(self.path / "old" / f"{time.strftime('%Y%m%d-%H%M%S')}-{name.replace('/', '-')}")
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(source, target)
            moved.append(target)
        return moved


def runs_dir() -> Path:
    """`BASE/runs`; need not exist."""
    return base_dir() / "runs"


def datasets_dir(base: Path | None = None) -> Path:
    """`BASE/datasets`; need not exist."""
    return (base or base_dir()) / "datasets"


def list_runs() -> list[RunDir]:
    """Every run, newest first (by the time its config was written)."""
    found = [RunDir(path.parent) for path in runs_dir().glob("*/config.json")]
    return sorted(found, key=lambda run: run.config_path.stat().st_mtime, reverse=True)


def run_named(name: str) -> RunDir:
    """The run of that name, whether or not it exists yet."""
    return RunDir(runs_dir() / check_name("run", name))


def find_run(name: str | None) -> RunDir:
    """The run a reading command means: `--run`, else `$PICOLLM_RUN`, else the newest.

    Raises:
        MissingArtifact: there is none, or none of that name.
    """
    name = name or os.environ.get("PICOLLM_RUN") or None
    if name is None:
        if runs := list_runs():
            return runs[0]
        raise MissingArtifact(
            "there is no run yet",
            cause=f"`{runs_dir()}` is empty",
            hint="make one with `picollm speedrun --preset demo`",
        )
    run = run_named(name)
    if not run.exists():
        raise MissingArtifact(
            f"there is no run `{name}`",
            cause=f"`{run.config_path}` does not exist",
            hint=did_you_mean(
                name, [known.name for known in list_runs()], "--run ", otherwise="list them with `picollm runs`"
            ),
        )
    return run
