"""Every path under the base directory, atomic writes, hashes, locks and stage records.

A run is a folder of stage folders. A stage is done when its `STAGE.json`, written last, matches its inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact

SCHEMA = 1
NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
# The order in which later stages depend on earlier ones; readers of "the latest stage" walk it backwards.
TRAINING_STAGES = ("pretrain", "sft", "rl")


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


# -- files ------------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on key order or white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Put a file's bytes, or a folder's list of names, on the disk: a rename alone may not survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a write into a HostError that names the place."""
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write `{path}`",
            cause=error.strerror or str(error),
            hint="free room or set PICOLLM_BASE_DIR to a directory you can write; `picollm doctor` checks both",
        ) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename, fsync of the folder.

    Raises:
        HostError: the directory cannot be written or the disk is full.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def free_name(path: Path) -> Path:
    """`path` where nothing has that name yet, else the first of `path~2`, `path~3`, … that is free."""
    candidate, serial = path, 1
    while candidate.exists():
        serial += 1
        candidate = path.with_name(f"{path.name}~{serial}")
    return candidate


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs; whole or not at all, as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, hint: str = "restore it from a copy, or start a new run with `--run NAME`") -> Any:
    """Parse a JSON file of ours.

    Args:
        hint: what to do when it is torn.

    Raises:
        IntegrityError: it is not JSON (torn or edited by hand).
        FileNotFoundError: there is no such file; callers know which command makes it.
    """
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"`{path}` is not readable JSON", cause=str(error), hint=hint) from error


def check_schema(path: Path, value: Any) -> dict[str, Any]:
    """Refuse a file written by a picollm with another layout of its files.

    Raises:
        IntegrityError: `schema` is missing or not ours.
    """
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise IntegrityError(
            f"`{path}` was written by another version of picollm",
            cause=f"its schema is {found!r}, this version reads {SCHEMA}",
            hint="use the picollm that made it, or start a new run with `--run NAME`",
        )
    return value


def read_fields(path: Path, fields: dict[str, type], *, hint: str) -> dict[str, Any]:
    """Read a JSON object of ours that holds certain fields; it may hold more.

    Args:
        fields: name -> type of the value as JSON gives it (dict, list, str, int).
        hint: what to do when it is torn or was edited.

    Raises:
        IntegrityError: torn, of another version, or a field is missing or of another type.
        FileNotFoundError: there is no such file.
    """
    value = check_schema(path, read_json(path, hint=hint))
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            found = f"of type {type(value[name]).__name__}" if name in value else "missing"
            raise IntegrityError(f"`{path}` is torn or was edited", cause=f"its field `{name}` is {found}", hint=hint)
    return value


# -- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_lock(path: Path, what: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold an advisory lock for the life of the block; the kernel drops it when the process dies.

    Raises:
        HostError: another process holds it after `wait_s`; its pid is named.
    """
    import filelock

    owner = path.with_name(path.name + ".owner")
    lock = filelock.FileLock(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait_s)
        except filelock.Timeout:
            pid = owner.read_text().strip() if owner.exists() else "unknown"
            raise HostError(
                f"{what} is in use by another process",
                cause=f"process {pid} holds `{path}`",
                hint=f"wait for it or stop it (`kill {pid}`), then run the same command again",
            ) from None
        try:
            owner.write_text(f"{os.getpid()}\n")
        except BaseException:
            lock.release()
            raise
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


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

    def read_config(self) -> dict[str, Any]:
        """`{"schema", "stage", "recipe", "runtime"}`, with `runtime.json` laid over its runtime.

        Raises:
            MissingArtifact: the stage was never prepared.
            IntegrityError: torn, or of another version.
        """
        redo = f"restore it, or redo the stage with `picollm speedrun --run {self.run.name} --force {self._command}`"
        try:
            config = read_fields(self.config_path, {"recipe": dict, "runtime": dict}, hint=redo)
        except FileNotFoundError:
            command = f"picollm {self._command} --run {self.run.name}"
            raise MissingArtifact(
                f"stage `{self.name}` of run `{self.run.name}` has no config",
                cause=f"`{self.config_path}` does not exist",
                hint=f"prepare it with `{command}`",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            changed = read_json(self.runtime_path, hint=f"remove it: `{self.config_path.name}` holds the first values")
            config["runtime"] = config["runtime"] | (changed if isinstance(changed, dict) else {})
        return config

    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step_*[0-9]"))

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
        except FileNotFoundError:
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
    from picollm.errors import nearest

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
        close = nearest(name, [known.name for known in list_runs()])
        raise MissingArtifact(
            f"there is no run `{name}`",
            cause=f"`{run.config_path}` does not exist",
            hint=f"did you mean `--run {close}`?" if close else "list them with `picollm runs`",
        )
    return run
