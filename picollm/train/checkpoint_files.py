"""Checkpoint folders without torch: names, parts, hashes, commit by rename, verification, retention.

    checkpoints/step_000500/
        model.safetensors              weights by parameter name
        meta.json                      step, data position, hashes of recipe and tokenizer
        state/rank_K-of-W.safetensors  rank K's share of the optimizer's tensors by parameter name
        state/index.json               global shapes of all of them, and which rows are in which file
        SHA256SUMS                     of all the above; `sha256sum -c SHA256SUMS` checks it by hand

Written as `step_000500.ATTEMPT.tmp`, hashed, fsynced, renamed; the stage's `latest` is replaced last. All ranks of an
attempt write into one such folder, which must be on a disk that they share. The attempt in its name keeps a process
left over from an earlier attempt out of it, and so whoever comes first may make it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from picollm.errors import IntegrityError, MissingArtifact
from picollm.files import disk_errors, free_name, fsync_path, read_fields, sha256_file, write_atomic
from picollm.run_dir import StageDir

SUMS = "SHA256SUMS"
RESTORE = "restore the file from a copy, or train the stage again: `picollm speedrun --run NAME --force STAGE`"


def checkpoint_dir(stage: StageDir, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return stage.checkpoints / f"step_{step:06d}"


# -- writing ----------------------------------------------------------------------------------------------------------


def temporary_dir(stage: StageDir, step: int, attempt: str) -> Path:
    """Where the checkpoint of a step is written before it is committed."""
    return stage.checkpoints / f"step_{step:06d}.{attempt}.tmp"


def begin(stage: StageDir, step: int, attempt: str | None = None, *, rank: int = 0) -> Path:
    """The temporary folder of a new checkpoint, made by whichever rank comes first.

    Args:
        attempt: what the ranks of this save have agreed to call it, never used before; None for a single process.
        rank: rank 0 also sweeps what earlier saves left behind.
    """
    temporary = temporary_dir(stage, step, attempt or secrets.token_hex(4))
    with disk_errors(temporary):
        if rank == 0 and stage.checkpoints.is_dir():
            for stale in stage.checkpoints.glob("*.tmp"):
                if stale != temporary:
                    shutil.rmtree(stale, ignore_errors=True)
        (temporary / "state").mkdir(parents=True, exist_ok=True)
    return temporary


def discard(temporary: Path) -> None:
    """Give up a checkpoint that could not be completed, so that ranks that watch it go on."""
    _remove(temporary)


def _remove(path: Path) -> None:
    """Delete a folder, if it is there. It vanishes at once: half of it must never be taken for a checkpoint."""
    gone = path.with_name(f"{path.name.removesuffix('.tmp')}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def commit(stage: StageDir, step: int, temporary: Path, *, keep_last: int, known: dict[str, str] | None = None) -> int:
    """Hash, fsync and rename the folder, point `latest` to it, prune older ones. Returns its bytes.

    Args:
        known: sha256 of files that were hashed and fsynced by whoever wrote them, by name in the folder.

    Raises:
        HostError: the disk is full or cannot be written; what was there before is untouched.
    """
    known = known or {}
    with disk_errors(temporary):
        names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        size = sum((temporary / name).stat().st_size for name in names)
        sums = "".join(f"{known.get(name) or sha256_file(temporary / name)}  {name}\n" for name in names)
        (temporary / SUMS).write_text(sums)
        for name in [*names, SUMS]:
            if name not in known:
                fsync_path(temporary / name)
        fsync_path(temporary / "state")
        fsync_path(temporary)
        target = checkpoint_dir(stage, step)
        _remove(target)  # a resumed run may have come to the same step again
        os.replace(temporary, target)
        fsync_path(stage.checkpoints)
    point_latest(stage, step)
    for old in [earlier for earlier in stage.finished_steps() if earlier <= step][:-keep_last]:
        _remove(checkpoint_dir(stage, old))
    return size + len(sums)


def point_latest(stage: StageDir, step: int) -> None:
    """Make `latest` name the checkpoint of a step, for whoever looks by hand."""
    write_atomic(stage.latest, f"{checkpoint_dir(stage, step).name}\n")


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that nothing takes it for one; its bytes stay for whoever wants to look.

    Left where it is, it would count among the last that are kept, and cost an intact one its place.
    """
    with disk_errors(path):
        os.replace(path, free_name(path.with_name(f"{path.name}.damaged")))


def write_meta(path: Path, meta: dict[str, Any]) -> None:
    """Write meta.json into a folder that is not committed yet."""
    (path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


# -- reading ----------------------------------------------------------------------------------------------------------


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


def verify(path: Path, *, only: tuple[str, ...] = (), rank: int = 0, world: int = 1) -> dict[str, str]:
    """Re-hash a checkpoint's files (or `only` some) and return the recorded hashes.

    Args:
        rank, world: of ranks that verify together, each hashes every `world`-th file, and all are needed for a verdict.

    Raises:
        IntegrityError: a file is missing or its bytes are not as recorded; it is named.
    """
    sums = read_sums(path)
    for name in list(only or sums)[rank::world]:
        file = path / name
        if not file.is_file():
            raise IntegrityError(f"checkpoint file `{file}` is missing", cause=f"`{SUMS}` lists it", hint=RESTORE)
        try:
            found = sha256_file(file)
        except OSError as error:
            raise IntegrityError(f"checkpoint file `{file}` cannot be read", cause=str(error), hint=RESTORE) from error
        if found != sums[name]:
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
