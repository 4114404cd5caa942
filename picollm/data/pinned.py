"""What a downloaded dataset is: every file with the Hub's size and sha256, written down before the first one comes.

`dataset.json` is never changed by fetching. More shards of a dataset make another record; the one before moves to
`older/`, where runs that were trained on it find it (`Dataset.open`). The shards are shared, because all records of
one folder are of one commit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from picollm import __version__
from picollm.data import hub
from picollm.data.dataset_record import OLDER_FOLDER, RECORD_NAME, ShardFile, Split
from picollm.data.dataset_writer import sweep
from picollm.data.datasets import Dataset
from picollm.data.registry import HubSource
from picollm.data.verified import column_problem
from picollm.errors import ConfigError, MissingArtifact, RemoteError
from picollm.files import SCHEMA, disk_errors, fsync_path, write_atomic, write_json
from picollm.locks import hold_lock
from picollm.run_dir import NAME_PATTERN, check_name, datasets_dir
from picollm.units import size


def pin(
    name: str, source: HubSource, *, shards: int | None = None, field: str | None = None, base: Path | None = None
) -> Dataset:
    """The dataset of that name, its record written or enlarged as asked; no shard is fetched.

    Args:
        shards: training files, the first by name; validation comes on top. Fewer than there are change nothing, None
            takes the dataset as it is.
        field: the column with the text; None means `text`, or that of the dataset that is there.

    Raises:
        ConfigError: the name is taken by other data, or the Hub has no such thing, or it has too few files.
        RemoteError: the Hub does not answer.
        HostError: the folder cannot be written, or another process downloads the dataset.
    """
    check_name("dataset", name)
    try:
        existing = Dataset.open(name, base)
    except MissingArtifact:
        return _first_record(name, source, shards, field or "text", base)
    _refuse_other(existing, source, field)
    if shards is None or shards <= len(existing.of("train")):
        return existing
    with hold_lock(existing.path / ".lock", f"dataset `{name}`"):
        return _enlarge(existing, source, shards, base)


def _first_record(name: str, source: HubSource, shards: int | None, field: str, base: Path | None) -> Dataset:
    listing = hub.list_files(source)
    there = len(listing.train)
    if shards is None:
        total = sum(file.bytes for file in listing.train)
        raise ConfigError(
            f"how many shards of `{source.repo}`?",
            cause=f"it has {there:,} of {size(total / there)} on average, {size(total)} in all",
            hint="say it with `--shards N`; one of climbmix is about 55 million tokens",
        )
    record = _record(name, source, listing, shards, field)
    footer = hub.read_footer(source.repo, listing.commit, listing.train[0])
    if problem := column_problem(footer, field):
        raise ConfigError(
            f"`{listing.train[0].path}` of `{source.repo}` cannot be read as text",
            cause=problem,
            hint="name the column that holds the text with `--field NAME`",
        )
    final = datasets_dir(base) / name
    temporary = final.with_name(f".{name}.{os.getpid()}.tmp")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent)
        temporary.mkdir()
        write_json(temporary / RECORD_NAME, record)
        temporary.rename(final)
        fsync_path(final.parent)
    return Dataset.open(name, base)


def _enlarge(existing: Dataset, source: HubSource, shards: int, base: Path | None) -> Dataset:
    """Write the record of more shards of the same commit, after the present one has a place of its own."""
    pinned = HubSource(source.repo, source.config, existing.source["revision"], source.validation)
    record = _record(existing.name, pinned, hub.list_files(pinned), shards, existing.column)
    kept = {(file["name"], file["sha256"]) for file in record["files"]}
    if lost := [file.name for file in existing.files if (file.name, file.sha256) not in kept]:
        raise RemoteError(
            f"`{source.repo}` is not what it was at the same commit",
            cause=f"`{lost[0]}` is missing or another",
            hint="download it under another name with `--name NAME`",
        )
    older = existing.path / OLDER_FOLDER / f"{existing.sha256[:16]}.json"
    write_atomic(older, (existing.path / RECORD_NAME).read_bytes())  # the same bytes: their hash is its identity
    write_json(existing.path / RECORD_NAME, record)
    return Dataset.open(existing.name, base)


def _record(name: str, source: HubSource, listing: hub.Listing, shards: int, field: str) -> dict[str, Any]:
    if not 1 <= shards <= len(listing.train):
        raise ConfigError(
            f"`{source.repo}` has no {shards:,} training shards",
            cause=f"it has {len(listing.train):,}, and {len(listing.validation):,} for validation",
            hint=f"choose `--shards` from 1 to {len(listing.train)}",
        )
    # Names are those of all files, so that they stay what they are when there are more.
    every = [*listing.train, *listing.validation]
    names = dict(zip(every, _local_names([file.path for file in every]), strict=True))
    splits: dict[Split, Sequence[hub.HubFile]] = {"train": listing.train[:shards], "validation": listing.validation}
    files = [
        ShardFile(names[file], split, None, file.bytes, None, file.sha256, file.path)
        for split, chosen in splits.items()
        for file in chosen
    ]
    where = {"hub": source.repo, "config": source.config, "revision": listing.commit, "column": field}
    return {
        "schema": SCHEMA,
        "name": name,
        "kind": "text",
        "source": {key: value for key, value in where.items() if value is not None} | {"shards": shards},
        "created_by": __version__,
        "files": [file.to_json() for file in files],
        "totals": {"bytes": sum(file.bytes for file in files)},
    }


def _local_names(paths: list[str]) -> list[str]:
    """Flat names for files of a repository: their own where they differ, else numbers."""
    names = [path.rpartition("/")[2] for path in paths]
    if len({name.lower() for name in names}) == len(names) and all(map(NAME_PATTERN.match, names)):
        return names
    return [f"{number:06d}.parquet" for number in range(len(paths))]


def _refuse_other(existing: Dataset, source: HubSource, field: str | None) -> None:
    was = existing.source
    same = (was.get("hub"), was.get("config")) == (source.repo, source.config)
    if same and source.revision != "main":
        same = was["revision"].startswith(source.revision)
    if not same or field not in (None, existing.column):
        found = f"`{was['hub']}` at {was['revision'][:12]}" if existing.is_downloaded else "not a download"
        column = f", column `{existing.column}`" if existing.is_downloaded else ""
        raise ConfigError(
            f"there is a dataset `{existing.name}` already",
            cause=f"it is {found}{column}",
            hint="give this one another name with `--name NAME`",
        )
