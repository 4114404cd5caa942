"""The token cache: a dataset's training text as tokens on disk, made once by several processes, read by all ranks.

    cache/tokens/<dataset>-<its hash>-<tokenizer's hash>/
        part-00000.tokens          ids, uint16 (uint32 for more than 65 536 of them), document after document
        part-00000.offsets.npy     where each document starts, uint64, and where the last one ends
        index.json                 written last: the parts with their documents, tokens and hashes

A part is finished when its offsets are there, so an interrupted build goes on. What does not match its index is not
read: the cache is thrown away and made again, because everything in it can be.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from picollm.data.datasets import Dataset
from picollm.data.pool import in_processes
from picollm.data.token_source import CachedTokens
from picollm.errors import HostError, IntegrityError
from picollm.files import SCHEMA, disk_errors, read_json, write_json
from picollm.locks import hold_lock
from picollm.tokenizer.cache_parts import (
    Part,
    count_finished,
    hash_parts,
    is_finished,
    open_part,
    sweep,
    token_dtype,
    write_part,
)
from picollm.tokenizer.tokenizer import Tokenizer

INDEX = "index.json"
# Characters of text in one part: work for one process for a few seconds.
PART_CHARS = 16_000_000
# Bytes of cache for a character of text before it is tokenised: two bytes for a token of about four characters.
BYTES_PER_CHAR = 0.6
CHARS_PER_TOKEN = 4
# Tokenising everything once, by all cores and before training, is worth it from this share of what would be tokenised
# one by one while training.
WORTH_IT = 0.5

# (what is being done, how much of it, of how much: 0 where that is not known), several times a second and at once when
# something else begins; what it raises ends the work, finished parts stay
Progress = Callable[[str, int, int], None]


def _quiet(doing: str, done: int, total: int) -> None:
    """Tell nobody."""


def cache_dir(base: Path, dataset: Dataset, tokenizer: Tokenizer) -> Path:
    """Where the tokens of a dataset under a tokenizer are, or would be."""
    return base / "cache/tokens" / f"{dataset.name}-{dataset.sha256[:12]}-{tokenizer.sha256[:12]}"


def expected_bytes(dataset: Dataset) -> float:
    """About what a dataset's cache takes on disk."""
    return dataset.chars("train") * BYTES_PER_CHAR


def wanted(dataset: Dataset, tokens: float, limit_bytes: float, readers: int = 1) -> tuple[bool, str]:
    """Whether a run of so many tokens should use a cache, and why.

    It pays when it is less work than tokenising what is drawn, which each of the `readers` would do for itself, and
    must not be larger than it may be.
    """
    if not limit_bytes:
        return False, "`data.cache_gib` is 0"
    if (size := expected_bytes(dataset)) > limit_bytes:
        return False, f"they would take about {size / 2**30:.1f} GiB, more than `data.cache_gib` leaves for them"
    drawn = tokens * CHARS_PER_TOKEN * readers / max(1, dataset.chars("train"))
    if drawn < WORTH_IT:
        return False, f"the run tokenises only {drawn:.0%} as much text as the dataset has"
    return True, "the run reads most of the dataset" if readers == 1 else "all ranks read the same text"


def open_cache(
    base: Path, dataset: Dataset, tokenizer: Tokenizer, *, verify: bool = True, on_progress: Progress = _quiet
) -> CachedTokens | None:
    """The finished cache, or None.

    A damaged one counts as none: `build` makes it again.

    Args:
        verify: hash every byte first; not needed where another process of the stage just did. Sizes are compared
            with the index anyway.
    """
    folder = cache_dir(base, dataset, tokenizer)
    try:
        index = _read_index(folder, dataset, tokenizer)
        parts = [
            open_part(
                folder,
                part["name"],
                token_dtype(tokenizer),
                num_documents=part["documents"],
                num_tokens=part["tokens"],
            )
            for part in index["parts"]
        ]
        if verify:
            hashes = _checked(folder, dataset, [part["name"] for part in index["parts"]], on_progress)
            if hashes != [part["sha256"] for part in index["parts"]]:
                return None
        with contextlib.suppress(OSError):  # somebody else's cache is as good
            os.utime(folder / INDEX)  # the one used longest ago goes first when room is short
        return CachedTokens(parts)
    except (OSError, IntegrityError, KeyError, TypeError, ValueError):
        return None


def _checked(folder: Path, dataset: Dataset, names: list[str], on_progress: Progress) -> list[str]:
    doing = f"checking the tokens of {dataset.name}"
    return hash_parts(folder, names, lambda done: on_progress(doing, done, len(names)))


def build(
    base: Path,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    processes: int,
    limit_bytes: float,
    keep: Collection[Path] = (),
    on_progress: Progress = _quiet,
) -> CachedTokens:
    """Open the cache, after making what is missing of it.

    While another process makes the same one, wait; when that one ends, however it does, go on from what it has made.

    Args:
        processes: that tokenise side by side; one works in this process.
        limit_bytes: room for all caches together; those used longest ago are removed for it, but none of `keep`.

    Raises:
        IntegrityError: a shard of the dataset is not as recorded; it is named.
        HostError: the disk is full.
    """
    folder = cache_dir(base, dataset, tokenizer)
    parts = _parts_of(dataset)

    def on_wait(pid: str) -> None:
        if (folder / INDEX).exists():
            on_progress(f"another run (process {pid}) is checking the tokens of {dataset.name}", 0, 0)
        else:
            doing = f"another run (process {pid}) is making the tokens of {dataset.name}"
            on_progress(doing, count_finished(folder), len(parts))

    with hold_lock(_lock_of(folder), f"the token cache of `{dataset.name}`", on_wait=on_wait):
        if (found := open_cache(base, dataset, tokenizer, on_progress=on_progress)) is not None:
            return found
        if (folder / INDEX).exists():  # finished, and yet not readable as recorded
            shutil.rmtree(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            _make_room(folder, expected_bytes(dataset), limit_bytes, keep)
            _check_disk(folder, expected_bytes(dataset))
        _tokenize(folder, dataset, base, tokenizer, parts, processes, on_progress)
        _write_index(folder, dataset, tokenizer, parts, on_progress)
    made = open_cache(base, dataset, tokenizer, verify=False)  # its hashes are of what was read just now
    if made is None:
        raise IntegrityError(f"the token cache `{folder}` does not read back as written", hint="check the disk")
    return made


def _parts_of(dataset: Dataset) -> list[Part]:
    documents = dataset.rows("train")
    rows = max(1, PART_CHARS * documents // max(1, dataset.chars("train")))
    return [Part(f"part-{i:05d}", i * rows, min((i + 1) * rows, documents)) for i in range(-(-documents // rows))]


def _identity(dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the index says the parts are of."""
    return {
        "schema": SCHEMA,
        "dataset_sha256": dataset.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": token_dtype(tokenizer).name,
    }


def _read_index(folder: Path, dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    expected = _identity(dataset, tokenizer)
    if {key: index[key] for key in expected} != expected:
        raise ValueError("another dataset or tokenizer")
    if sum(part["documents"] for part in index["parts"]) != dataset.rows("train"):
        raise ValueError("documents are missing")
    return index


def _write_index(
    folder: Path, dataset: Dataset, tokenizer: Tokenizer, parts: list[Part], on_progress: Progress
) -> None:
    """Look at what was made and finish the cache with its record.

    Raises:
        IntegrityError: a part is not as it was made.
    """
    dtype, entries = token_dtype(tokenizer), []
    try:
        hashes = _checked(folder, dataset, [part.name for part in parts], on_progress)
        for part, digest in zip(parts, hashes, strict=True):
            documents = part.num_documents
            tokens, _ = open_part(folder, part.name, dtype, num_documents=documents)
            entries.append({"name": part.name, "documents": documents, "tokens": len(tokens), "sha256": digest})
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"the token cache `{folder}` was changed while it was made",
            cause=str(error),
            hint="run the same command again; what is missing is made again",
        ) from error
    sweep(folder)
    write_json(folder / INDEX, _identity(dataset, tokenizer) | {"parts": entries})


def _make_room(folder: Path, needed: float, limit: float, keep: Collection[Path]) -> None:
    """Remove other caches, those used longest ago first, until this one fits beside them."""
    others = []
    for other in folder.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run makes room as well
            if other.is_dir() and other != folder:
                index = other / INDEX
                used = index.stat().st_mtime if index.exists() else other.stat().st_mtime
                others.append((used, other, _bytes_in(other)))
    total = sum(size for _, _, size in others)
    for _, other, size in sorted(others):
        if total + needed <= limit:
            return
        if other in keep:
            continue
        with contextlib.suppress(HostError), hold_lock(_lock_of(other), "a token cache"):  # not one that is being made
            shutil.rmtree(other, ignore_errors=True)
            total -= size


def _check_disk(folder: Path, expected: float) -> None:
    """Raises HostError: what is still to be written does not fit. Said now, not after an hour of tokenising."""
    needed = expected - _bytes_in(folder)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise HostError(
            f"there is no room for the token cache `{folder}`",
            cause=f"about {needed / 2**30:.1f} GiB are to come, {free / 2**30:.1f} GiB are free",
            hint="free some, or tokenise while training: `--set data.cache_gib=0`",
        )


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a file that is being written gets another name
            total += file.stat().st_size
    return total


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


# -- tokenising -------------------------------------------------------------------------------------------------------


def _tokenize(
    folder: Path,
    dataset: Dataset,
    base: Path,
    tokenizer: Tokenizer,
    parts: list[Part],
    processes: int,
    on_progress: Progress,
) -> None:
    """Write the parts that are missing or short."""
    missing = [part for part in parts if not is_finished(folder, part, token_dtype(tokenizer))]
    total = sum(part.num_documents for part in parts)
    done = total - sum(part.num_documents for part in missing)

    def tell(more: int) -> None:
        nonlocal done
        done += more
        on_progress(f"tokenising {dataset.name}", done, total)

    tell(0)
    if processes == 1 or len(missing) <= 1:
        documents = dataset.documents("train")
        for part in missing:
            write_part(folder, documents, tokenizer, part, tell)
        return
    setup = (folder, dataset.name, dataset.sha256, base, tokenizer.json)
    work = in_processes(
        _work, missing, min(processes, len(missing)), setup=_open, arguments=setup, tick=lambda: tell(0)
    )
    with contextlib.closing(work):
        for documents in work:
            tell(documents)


_worker: tuple[Path, Any, Tokenizer]


def _open(folder: Path, name: str, sha256: str, base: Path, tokenizer_json: bytes) -> None:
    """In a process of the pool: open what every part needs, once."""
    global _worker
    _worker = (folder, Dataset.open(name, base, keep=(sha256,)).documents("train"), Tokenizer(tokenizer_json))


def _work(part: Part) -> int:
    folder, documents, tokenizer = _worker
    write_part(folder, documents, tokenizer, part, lambda more: None)
    return part.num_documents
