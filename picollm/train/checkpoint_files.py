"""Checkpoint folders without torch: names, hashes, commit by rename, verification, retention.

    checkpoints/step_000500/
        model.safetensors            weights by parameter name
        meta.json                    step, data position, hashes of recipe and tokenizer
        state/rank_0-of-1.safetensors  optimizer tensors by parameter name
        state/index.json             their global shapes and row ranges
        SHA256SUMS                   of all the above; `sha256sum -c SHA256SUMS` checks it by hand

Written as `step_000500.tmp`, hashed, fsynced, renamed; the stage's `latest` is replaced last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from picollm.errors import IntegrityError, MissingArtifact
from picollm.files import disk_errors, free_name, fsync_path, read_fields, sha256_file, write_atomic
from picollm.run_dir import StageDir

SUMS = "SHA256SUMS"
RESTORE = "restore the file from a copy, or train the stage again with `picollm speedrun --force STAGE`"


def checkpoint_dir(stage: StageDir, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return stage.checkpoints / f"step_{step:06d}"


def begin(stage: StageDir, step: int) -> Path:
    """An empty temporary folder for a new checkpoint; leftovers of crashed attempts are swept."""
    with disk_errors(stage.checkpoints):
        stage.checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in stage.checkpoints.glob("*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary = stage.checkpoints / f"step_{step:06d}.tmp"
        (temporary / "state").mkdir(parents=True)
    return temporary


def commit(stage: StageDir, step: int, temporary: Path, *, keep_last: int) -> int:
    """Hash, fsync and rename the folder, point `latest` to it, prune older ones. Returns its bytes.

    Raises:
        HostError: the disk is full or cannot be written; what was there before is untouched.
    """
    with disk_errors(temporary):
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = "".join(f"{sha256_file(path)}  {path.relative_to(temporary).as_posix()}\n" for path in files)
        (temporary / SUMS).write_text(sums)
        for path in [*files, temporary / SUMS]:
            fsync_path(path)
        fsync_path(temporary / "state")
        fsync_path(temporary)
        target = checkpoint_dir(stage, step)
        if target.exists():  # a resumed run has come to the same step again
            shutil.rmtree(target)
        os.replace(temporary, target)
        fsync_path(stage.checkpoints)
    write_atomic(stage.latest, f"{target.name}\n")
    steps = stage.finished_steps()
    # Training went on from an earlier step, so a later one did not load: it must not outlive a good one in its place.
    for damaged in (later for later in steps if later > step):
        _set_aside(checkpoint_dir(stage, damaged))
    for old in [earlier for earlier in steps if earlier <= step][:-keep_last]:
        shutil.rmtree(checkpoint_dir(stage, old), ignore_errors=True)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one; its bytes stay for whoever wants to look."""
    with disk_errors(path):
        os.replace(path, free_name(path.with_name(f"{path.name}.damaged")))


def read_sums(path: Path) -> dict[str, str]:
    """File name -> sha256 as recorded in a checkpoint folder.

    Raises:
        IntegrityError: the list is missing or torn.
    """
    try:
        lines = (path / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"checkpoint `{path}` has no list of hashes", cause=str(error), hint=RESTORE) from error
    sums = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not name or name.startswith("/") or ".." in Path(name).parts:
            raise IntegrityError(
                f"`{path / SUMS}` is torn or was edited",
                cause=f"line {line!r} is not a hash and a name",
                hint=RESTORE,
            )
        sums[name] = digest
    if not {"model.safetensors", "meta.json"} <= sums.keys():
        raise IntegrityError(f"`{path / SUMS}` is torn or was edited", cause="it does not list all files", hint=RESTORE)
    return sums


def verify(path: Path, *, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Re-hash a checkpoint's files (or `only` some) and return the recorded hashes.

    Raises:
        IntegrityError: a file is missing or its bytes are not as recorded; it is named.
    """
    sums = read_sums(path)
    for name in only or sums:
        file = path / name
        if not file.is_file():
            raise IntegrityError(f"checkpoint file `{file}` is missing", cause=f"`{SUMS}` lists it", hint=RESTORE)
        if (found := sha256_file(file)) != sums[name]:
            raise IntegrityError(
                f"checkpoint file `{file}` is damaged",
                cause=f"its sha256 is {found[:12]}…, recorded was {sums[name][:12]}…",
                hint=RESTORE,
            )
    return sums


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint's meta.json.

    Raises:
        IntegrityError: missing, torn, or of another version.
    """
    try:
        return read_fields(path / "meta.json", {"step": int}, hint=RESTORE)
    except FileNotFoundError:
        raise IntegrityError(f"checkpoint `{path}` has no meta.json", hint=RESTORE) from None


def latest_step(stage: StageDir) -> int:
    """Step of the stage's newest checkpoint.

    Raises:
        MissingArtifact: there is none.
    """
    if steps := stage.finished_steps():
        return steps[-1]
    raise MissingArtifact(
        f"stage `{stage.name}` of run `{stage.run.name}` has no checkpoint",
        cause=f"`{stage.checkpoints}` holds none that was completed",
        hint=f"make one with `picollm {stage.name.split('/')[0]} --run {stage.run.name}`",
    )


def checkpoint_sha256(stage: StageDir) -> tuple[int, str]:
    """(step, recorded sha256 of the weights) of the stage's newest checkpoint."""
    step = latest_step(stage)
    return step, read_sums(checkpoint_dir(stage, step))["model.safetensors"]


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write meta.json into a folder that is not committed yet."""
    (path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
