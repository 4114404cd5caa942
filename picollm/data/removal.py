"""Taking a dataset off the disk, with the token caches that were made from it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from picollm.data.datasets import Dataset
from picollm.errors import IntegrityError, MissingArtifact
from picollm.files import disk_errors
from picollm.locks import hold_lock
from picollm.run_dir import TRAINING_STAGES, RunDir, StageDir, base_dir, datasets_dir, list_runs, run_named


@dataclass(frozen=True)
class Removal:
    """What removing a dataset would take.

    Attributes:
        caches: folders of tokens made from it, or from a dataset that had its name.
        bytes: what all of it takes on disk.
        runs: names of runs that were prepared with it.
    """

    name: str
    folder: Path
    caches: tuple[Path, ...]
    bytes: int
    runs: tuple[str, ...]


def plan_removal(name: str) -> Removal:
    """Look at what is there; a torn dataset can be removed too.

    Raises:
        ConfigError: the name cannot be one.
        MissingArtifact: there is neither such a dataset nor a cache of it.
    """
    folder, caches = datasets_dir() / name, _caches(name)
    digests: set[str] = set()
    try:
        digests = Dataset.open(name).identities
    except IntegrityError:
        pass
    except MissingArtifact:
        if not caches:
            raise
    runs = tuple(run.name for run in list_runs() if _uses(run, name, digests))
    return Removal(name, folder, caches, sum(map(_bytes, (folder, *caches))), runs)


def remove(removal: Removal) -> None:
    """Delete the dataset and its caches. The name is free at once, so a kill in the middle leaves no half dataset.

    Raises:
        HostError: a running stage reads it, or another process downloads it; or the disk refuses.
    """
    with contextlib.ExitStack() as locks:
        for run in map(run_named, removal.runs):
            for stage in _stages(run):
                if stage.lock_path.exists():
                    locks.enter_context(hold_lock(stage.lock_path, f"stage `{stage.name}` of run `{run.name}`"))
        if removal.folder.is_dir():
            lock = removal.folder / ".lock"
            if lock.exists():  # of a download; an imported dataset has none
                locks.enter_context(hold_lock(lock, f"dataset `{removal.name}`"))
        for cache in removal.caches:
            with disk_errors(cache):
                (cache / "index.json").unlink(missing_ok=True)  # without it the rest counts for nothing
                shutil.rmtree(cache)
        folder = removal.folder
        with disk_errors(folder):
            if folder.is_symlink():
                folder.unlink()
            elif folder.is_dir():
                # The name that leftovers of an import have: the next import sweeps them.
                doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
                folder.rename(doomed)
                shutil.rmtree(doomed)


def _caches(name: str) -> tuple[Path, ...]:
    pattern = re.compile(rf"{re.escape(name)}-[0-9a-f]{{12}}-[0-9a-f]{{12}}")
    folder = base_dir() / "cache/tokens"
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(path for path in found if pattern.fullmatch(path.name)))


def _bytes(folder: Path) -> int:
    if folder.is_symlink():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _stages(run: RunDir) -> list[StageDir]:
    return [run.stage(stage) for stage in TRAINING_STAGES]


def _uses(run: RunDir, name: str, digests: set[str]) -> bool:
    """Whether a stage of the run was prepared with the dataset; without a hash, with one of its name."""
    try:
        if digests:
            return not digests.isdisjoint(run.dataset_hashes())
        configs = [stage.read_config() for stage in _stages(run) if stage.config_path.is_file()]
    except IntegrityError:  # a torn run trains on nothing
        return False
    return any(source["dataset"] == name for config in configs for source in config["recipe"].get("data", []))
