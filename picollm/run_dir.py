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
NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
# The order in which later stages depend on earlier ones; readers of "the latest stage" walk it backwards.
TRAINING_STAGES = ("pretrain", "sft", "rl")


def base_dir() -> Path:
    """`$PICOLLM_BASE_DIR`, else the user's data directory; holds datasets, caches and runs."""
    if configured := os.environ.get("PICOLLM_BASE_DIR"):
        return Path(configured).expanduser().absolute()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share").expanduser().absolute() / "picollm"


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
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on key order or white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync_dir(path: Path) -> None:
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
        fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours.

    Raises:
        IntegrityError: it is not JSON (torn or edited by hand).
        FileNotFoundError: there is no such file; callers know which command makes it.
    """
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"`{path}` is not readable JSON", cause=str(error)) from error


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
        try:
            config = check_schema(self.config_path, read_json(self.config_path))
        except FileNotFoundError:
            command = f"picollm {self.name.split('/')[0]} --run {self.run.name}"
            raise MissingArtifact(
                f"stage `{self.name}` of run `{self.run.name}` has no config",
                cause=f"`{self.config_path}` does not exist",
                hint=f"prepare it with `{command}`",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            config["runtime"] = config["runtime"] | read_json(self.runtime_path)
        return config

    def has_checkpoint(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step_*[0-9]"))

    def record(self) -> dict[str, Any] | None:
        """The stage's record, or None when it has not finished."""
        try:
            return check_schema(self.record_path, read_json(self.record_path))
        except FileNotFoundError:
            return None

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
        return check_schema(self.config_path, read_json(self.config_path))

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
            target = self.path / "old" / f"{time.strftime('%Y%m%d-%H%M%S')}-{name.replace('/', '-')}"
            serial = 1
            while target.exists():
                serial += 1
                target = target.with_name(f"{target.name.split('~')[0]}~{serial}")
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(source, target)
            moved.append(target)
        return moved


def runs_dir() -> Path:
    return base_dir() / "runs"


def datasets_dir(base: Path | None = None) -> Path:
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
