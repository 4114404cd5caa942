"""`manifest.json`: every file of a run with its size, hash, the stage that made it and what that stage was made from.

{"schema": 1, "run", "picollm", "data", "files": [{"path", "bytes", "sha256", "stage", "from": {input: sha256}}]}

`data` is what each training stage has read: {stage: [{"dataset", "documents", "tokens", "epochs", "share"}]}.

Paths are relative to the run, so a copied run verifies where it lands. Left out are files that say who is at work
(locks, pids), logs, temporary files, `old/` (what `--force` set aside) and the manifest itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from picollm.errors import HostError, IntegrityError, MissingArtifact
from picollm.files import SCHEMA, check_schema, read_json, sha256_file, write_json
from picollm.run_dir import RunDir

Progress = Callable[[int, int], None]

SHOWN_PROBLEMS = 10
EXPORT = "export"  # the folder of what `picollm export` writes into a run

# Who is at work right now, not what was made.
_TRANSIENT_FILES = frozenset({"lock", "lock.owner", "pid", "launcher", "nodes", "STOP", "tokens"})
_SKIPPED_FOLDERS = frozenset({"log", "old"})
_REPORT_FILES = re.compile(r"^(report\.(md|json|html)|plots/.+)$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Problem:
    """One difference between a manifest and the folder.

    `missing`: listed, not there. `changed`: other bytes than listed. `unlisted`: there, not listed.
    """

    path: str
    kind: Literal["missing", "changed", "unlisted"]
    detail: str

    def __str__(self) -> str:
        return f"{self.kind:<9}{self.path} ({self.detail})"


def list_files(run: RunDir) -> list[str]:
    """Paths, relative and sorted, of the files a manifest of the run lists."""
    found = []
    # A part that was moved to another disk and linked is still of the run.
    for folder, subfolders, names in os.walk(run.path, followlinks=True):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.endswith(".tmp") and not _leads_back(folder, name)
        ]
        for name in names:
            path = Path(folder, name)
            if name in _TRANSIENT_FILES or name.endswith(".tmp") or path == run.manifest_path:
                continue
            found.append(path.relative_to(run.path).as_posix())
    return sorted(found)


def _leads_back(folder: str, name: str) -> bool:
    """Whether a subfolder is a link to a folder that the way to it led through, which would never end."""
    link, way = Path(folder, name), (Path(folder), *Path(folder).parents)
    return link.is_symlink() and any(each.resolve().is_relative_to(link.resolve()) for each in way)


def stage_of(path: str) -> str:
    """The stage whose folder holds a file; `report` and `run` own the files beside the stage folders."""
    parts = PurePosixPath(path).parts
    if _REPORT_FILES.match(path):
        return "report"
    if len(parts) == 1:
        return "run"
    if parts[0] == "eval" and len(parts) > 2:
        return "/".join(parts[:2])
    return parts[0]


def write_manifest(run: RunDir, *, on_progress: Progress | None = None) -> dict[str, Any]:
    """Hash every file of the run and write `manifest.json`.

    Args:
        on_progress: called with bytes hashed so far and bytes in all.

    Raises:
        IntegrityError: a file is not as its stage recorded it; a manifest must not bless changed bytes.
        HostError: a file cannot be read, or the manifest not be written.
    """
    from picollm import __version__

    paths = list_files(run)
    stages = sorted({stage_of(path) for path in paths} - {"run", "report"})
    records = {stage: run.stage(stage).record() for stage in stages}
    files = []
    for path, size, sha256 in _hash_all(run, paths, on_progress):
        record = records.get(stage_of(path))
        files.append(
            {
                "path": path,
                "bytes": size,
                "sha256": sha256,
                "stage": stage_of(path),
                "from": record["inputs"] if record else {},
            }
        )
    if problems := list(_against_records(files, records)):
        raise IntegrityError(
            f"run `{run.name}` is not as its stages recorded it",
            cause=describe(problems),
            hint=f"make the stage again, as with `picollm speedrun --run {run.name} --force STAGE`",
        )
    read = {stage: record["result"]["data"] for stage, record in records.items() if record and _has_data(record)}
    manifest = {"schema": SCHEMA, "run": run.name, "picollm": __version__, "data": read, "files": files}
    write_json(run.manifest_path, manifest)
    return manifest


def list_exports(run: RunDir) -> None:
    """Bring the entries of `export/` in a manifest that is there up to date; all others stay as they were written.

    An export comes after a run's last stage. Writing the whole manifest again would hide what changed since.
    """
    if not run.manifest_path.exists():
        return
    manifest = read_manifest(run)
    kept = [entry for entry in manifest["files"] if entry["stage"] != EXPORT]
    paths = [path for path in list_files(run) if stage_of(path) == EXPORT]
    made = [
        {"path": path, "bytes": size, "sha256": sha256, "stage": EXPORT, "from": {}}
        for path, size, sha256 in _hash_all(run, paths, None)
    ]
    manifest["files"] = sorted([*kept, *made], key=lambda entry: entry["path"])
    write_json(run.manifest_path, manifest)


def read_manifest(run: RunDir) -> dict[str, Any]:
    """The stored manifest, checked to be one.

    Raises:
        MissingArtifact: it was never written.
        IntegrityError: torn, of another version, or an entry is malformed or points outside the run.
    """
    path = run.manifest_path
    try:
        manifest = check_schema(path, read_json(path))
    except FileNotFoundError:
        raise MissingArtifact(
            f"run `{run.name}` has no manifest",
            cause=f"`{path}` does not exist",
            hint=f"write it with `picollm manifest write --run {run.name}`",
        ) from None
    files = manifest.get("files")
    if not isinstance(files, list):
        raise IntegrityError(f"`{path}` is not a manifest", cause="it has no list named `files`")
    for number, entry in enumerate(files):
        if not _is_entry(entry):
            raise IntegrityError(
                f"`{path}` has a malformed entry",
                cause=f"entry {number} is not a path inside the run with bytes, sha256, stage and from",
                hint=f"write it again with `picollm manifest write --run {run.name}`",
            )
    return manifest


def verify_manifest(run: RunDir, *, on_progress: Progress | None = None) -> list[Problem]:
    """Compare the folder with its manifest by hashing every file again. An empty list means equal.

    Args:
        on_progress: called with bytes hashed so far and bytes in all.

    Raises:
        MissingArtifact, IntegrityError: as `read_manifest`.
        HostError: a file cannot be read.
    """
    listed = {entry["path"]: entry for entry in read_manifest(run)["files"]}
    present = set(list_files(run))
    problems = [Problem(path, "missing", "it is listed, not there") for path in listed if path not in present]
    problems += [Problem(path, "unlisted", "made after the manifest") for path in present if path not in listed]
    for path, size, sha256 in _hash_all(run, sorted(present & set(listed)), on_progress):
        problems += _difference(path, listed[path], size, sha256)
    return sorted(problems, key=lambda problem: (problem.path, problem.kind))


def describe(problems: list[Problem]) -> str:
    """The problems for an error's cause: one a line, the first few, then how many more."""
    lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n         ".join(lines)


def _hash_all(run: RunDir, paths: list[str], on_progress: Progress | None) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, sha256) of each file, with progress in bytes."""
    try:
        sizes = [(run.path / path).stat().st_size for path in paths]
        total, done = sum(sizes), 0
        for path, size in zip(paths, sizes, strict=True):
            yield path, size, sha256_file(run.path / path)
            done += size
            if on_progress:
                on_progress(done, total)
    except OSError as error:
        raise HostError(
            f"cannot read `{error.filename}`",
            cause=error.strerror or str(error),
            hint="wait until nothing writes to the run (`picollm runs`), then run the same command again",
        ) from error


def _has_data(record: dict[str, Any]) -> bool:
    return isinstance(record.get("result"), dict) and "data" in record["result"]


def _against_records(files: list[dict[str, Any]], records: dict[str, dict[str, Any] | None]) -> Iterator[Problem]:
    """What the stages' own records say about the bytes now in their folders."""
    found = {entry["path"]: entry for entry in files}
    for stage, record in records.items():
        for name, output in (record or {"outputs": {}})["outputs"].items():
            path = f"{stage}/{name}"
            if path not in found:
                yield Problem(path, "missing", f"`{stage}/STAGE.json` lists it")
            else:
                yield from _difference(path, output, found[path]["bytes"], found[path]["sha256"])


def _difference(path: str, recorded: dict[str, Any], size: int, sha256: str) -> Iterator[Problem]:
    if size != recorded["bytes"]:
        yield Problem(path, "changed", f"{size:,} bytes, recorded {recorded['bytes']:,}")
    elif sha256 != recorded["sha256"]:
        yield Problem(path, "changed", f"sha256 {sha256[:12]}, recorded {recorded['sha256'][:12]}")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(path := entry.get("path"), str):
        return False
    inside = path and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts
    return bool(
        inside
        and isinstance(entry.get("bytes"), int)
        and _SHA256.match(str(entry.get("sha256")))
        and isinstance(entry.get("stage"), str)
        and isinstance(entry.get("from"), dict)
    )
