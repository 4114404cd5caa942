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
import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from picollm.data.datasets import Dataset
from picollm.data.pool import in_processes
from picollm.data.token_source import CachedTokens
from picollm.errors import HostError, IntegrityError
from picollm.files import SCHEMA, disk_errors, fsync_path, read_json, sha256_file, write_json
from picollm.locks import hold_lock
from picollm.tokenizer.tokenizer import Tokenizer

INDEX = "index.json"
# Characters of text in one part: work for one process for a few seconds.
PART_CHARS = 16_000_000
BATCH_DOCUMENTS = 256
# Bytes of cache for a character of text before it is tokenised: two bytes for a token of about four characters.
BYTES_PER_CHAR = 0.6
CHARS_PER_TOKEN = 4
# Tokenising everything once, by all cores and before training, is worth it from this share of what would be tokenised
# one by one while training.
WORTH_IT = 0.5

# (documents tokenised, documents in all); what it raises ends the build, finished parts stay
Progress = Callable[[int, int], None]


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


def open_cache(base: Path, dataset: Dataset, tokenizer: Tokenizer, *, verify: bool = True) -> CachedTokens | None:
    """The finished cache, or None.

    A damaged one counts as none: `build` makes it again.

    Args:
        verify: hash every byte first; not needed where another process of the stage just did.
    """
    folder = cache_dir(base, dataset, tokenizer)
    try:
        index = _read_index(folder, dataset, tokenizer)
        if verify and not _is_intact(folder, index):
            return None
        with contextlib.suppress(OSError):  # somebody else's cache is as good
            os.utime(folder / INDEX)  # the one used longest ago goes first when room is short
        return CachedTokens([_open_part(folder, part["name"], index["dtype"]) for part in index["parts"]])
    except (OSError, IntegrityError, KeyError, TypeError, ValueError):
        return None


def _is_intact(folder: Path, index: dict[str, Any]) -> bool:
    sums = _hash_parts(folder, [part["name"] for part in index["parts"]])
    return all(part["sha256"] == found for part, found in zip(index["parts"], sums, strict=True))


def build(
    base: Path,
    dataset: Dataset,
    tokenizer: Tokenizer,
    *,
    processes: int,
    limit_bytes: float,
    keep: Collection[Path] = (),
    on_progress: Progress | None = None,
) -> CachedTokens:
    """Open the cache, after making what is missing of it.

    Args:
        processes: that tokenise side by side; one works in this process.
        limit_bytes: room for all caches together; those used longest ago are removed for it, but none of `keep`.
        on_progress: called several times a second.

    Raises:
        IntegrityError: a shard of the dataset is not as recorded; it is named.
        HostError: the disk is full.
    """
    folder = cache_dir(base, dataset, tokenizer)
    with hold_lock(_lock_of(folder), f"the token cache of `{dataset.name}`", wait_s=60):
        if (found := open_cache(base, dataset, tokenizer)) is not None:
            return found
        if (folder / INDEX).exists():  # finished, and yet not readable as recorded
            shutil.rmtree(folder)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, expected_bytes(dataset), limit_bytes, keep)
            _check_disk(folder, expected_bytes(dataset))
        documents = dataset.rows("train")
        rows = max(1, PART_CHARS * documents // max(1, dataset.chars("train")))
        tasks = [(f"part-{i:05d}", i * rows, min((i + 1) * rows, documents)) for i in range(-(-documents // rows))]
        _run(folder, dataset, base, tokenizer, tasks, processes, on_progress)
        parts = []
        sums = _hash_parts(folder, [name for name, _, _ in tasks])
        for (name, start, end), digest in zip(tasks, sums, strict=True):
            tokens, offsets = _open_part(folder, name, _dtype(tokenizer).name)
            if len(offsets) != end - start + 1:
                raise IntegrityError(
                    f"`{folder / name}` of the token cache is damaged", hint=f"remove `{folder}`; it is made again"
                )
            parts.append({"name": name, "documents": end - start, "tokens": len(tokens), "sha256": digest})
        write_json(
            folder / INDEX,
            {
                "schema": SCHEMA,
                "dataset_sha256": dataset.sha256,
                "tokenizer_sha256": tokenizer.sha256,
                "dtype": _dtype(tokenizer).name,
                "parts": parts,
            },
        )
    made = open_cache(base, dataset, tokenizer, verify=False)  # its hashes are of what was read just now
    if made is None:
        raise IntegrityError(f"the token cache `{folder}` does not read back as written", hint="check the disk")
    return made


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _read_index(folder: Path, dataset: Dataset, tokenizer: Tokenizer) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if (index["schema"], index["dataset_sha256"], index["tokenizer_sha256"]) != (
        SCHEMA, dataset.sha256, tokenizer.sha256,
    ):  # fmt: skip
        raise ValueError("another dataset or tokenizer")
    if sum(part["documents"] for part in index["parts"]) != dataset.rows("train"):
        raise ValueError("documents are missing")
    return index


def _hash_part(folder: Path, name: str) -> str:
    files = (folder / f"{name}.tokens", folder / f"{name}.offsets.npy")
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def _hash_parts(folder: Path, names: list[str]) -> list[str]:
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return list(threads.map(lambda name: _hash_part(folder, name), names))


def _open_part(folder: Path, name: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    path = folder / f"{name}.offsets.npy"
    with open(path, "rb") as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"its array format is {version}")
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    offsets = _mapped(path, kind, start)
    if offsets.shape != shape:
        raise ValueError("offsets are missing")
    return _mapped(folder / f"{name}.tokens", np.dtype(dtype), 0), offsets


def _mapped(path: Path, dtype: np.dtype, start: int) -> np.ndarray:
    """A file's values from a byte on, mapped.

    Not by `np.memmap`, which keeps a file open for as long as it is mapped: a large dataset has thousands of parts, and
    a process may often have 1 024 files open.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), dtype=dtype, offset=start)


def _make_room(folder: Path, needed: float, limit: float, keep: Collection[Path]) -> None:
    """Remove other caches, those used longest ago first, until this one fits beside them."""
    others = []
    for other in folder.parent.iterdir():
        if other.is_dir() and other != folder:
            index = other / INDEX
            used = index.stat().st_mtime if index.exists() else other.stat().st_mtime
            others.append((used, other, sum(file.stat().st_size for file in other.iterdir())))
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
    needed = expected - sum(file.stat().st_size for file in folder.iterdir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise HostError(
            f"there is no room for the token cache `{folder}`",
            cause=f"about {needed / 2**30:.1f} GiB are to come, {free / 2**30:.1f} GiB are free",
            hint="free some, or tokenise while training: `--set data.cache_gib=0`",
        )


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


# -- tokenising -------------------------------------------------------------------------------------------------------


def _run(
    folder: Path,
    dataset: Dataset,
    base: Path,
    tokenizer: Tokenizer,
    tasks: list[tuple[str, int, int]],
    processes: int,
    on_progress: Progress | None,
) -> None:
    missing = [task for task in tasks if not (folder / f"{task[0]}.offsets.npy").exists()]
    total = tasks[-1][2] if tasks else 0
    done = total - sum(end - start for _, start, end in missing)

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if on_progress:
            on_progress(done, total)

    tell(0)
    if processes == 1 or len(missing) <= 1:
        documents = dataset.documents("train")
        for task in missing:
            _tokenize(folder, documents, tokenizer, task, tell)
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


def _work(task: tuple[str, int, int]) -> int:
    folder, documents, tokenizer = _worker
    _tokenize(folder, documents, tokenizer, task, lambda more: None)
    return task[2] - task[1]


def _tokenize(
    folder: Path, documents: Any, tokenizer: Tokenizer, task: tuple[str, int, int], tell: Callable[[int], None]
) -> None:
    """Write one part; its offsets come last and under their name only when both files are on disk."""
    name, first, end = task
    path, dtype = folder / f"{name}.tokens", _dtype(tokenizer)
    offsets = np.zeros(end - first + 1, dtype=np.uint64)
    with disk_errors(path):
        with open(path, "wb") as file:
            for start in range(first, end, BATCH_DOCUMENTS):
                texts = documents[start : min(start + BATCH_DOCUMENTS, end)]
                for i, ids in enumerate(tokenizer.encode_batch(texts), start - first):
                    file.write(np.array(ids, dtype=dtype).tobytes())
                    offsets[i + 1] = offsets[i] + np.uint64(len(ids))
                tell(len(texts))
        fsync_path(path)
        temporary = folder / f"{name}.offsets.tmp.npy"
        np.save(temporary, offsets, allow_pickle=False)
        fsync_path(temporary)
        os.replace(temporary, folder / f"{name}.offsets.npy")
