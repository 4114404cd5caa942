"""The files of one part of a token cache: written under their names when they are whole, mapped, and hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from picollm.files import disk_errors, fsync_path, sha256_file
from picollm.tokenizer.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256
POLL_S = 0.2


class Part(NamedTuple):
    """Which documents of a dataset a part holds: from `first` up to `end`, which is the next part's."""

    name: str
    first: int
    end: int

    @property
    def num_documents(self) -> int:
        return self.end - self.first


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type that ids are stored in."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def count_finished(folder: Path) -> int:
    """Parts that are whole in a folder; 0 when there is no such folder."""
    return sum(1 for _ in folder.glob("*.offsets.npy"))


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written; whoever calls it holds the cache's lock."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def write_part(
    folder: Path, documents: Sequence[str], tokenizer: Tokenizer, part: Part, tell: Callable[[int], None]
) -> None:
    """Tokenise a part's documents and write it; a part is finished when its offsets have their name.

    Until then its files bear the process's number: helpers of a process that was killed live on for a second, when
    another one may be at the same part already.

    Args:
        tell: called with the documents done since the last call.

    Raises:
        HostError: the disk is full.
    """
    tokens_path, offsets_path = folder / f"{part.name}.tokens", folder / f"{part.name}.offsets.npy"
    tokens_tmp, offsets_tmp = (path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (tokens_path, offsets_path))
    dtype = token_dtype(tokenizer)
    offsets = np.zeros(part.num_documents + 1, dtype=np.uint64)
    with disk_errors(tokens_path):
        with open(tokens_tmp, "wb") as file:
            for start in range(part.first, part.end, BATCH_DOCUMENTS):
                texts = documents[start : min(start + BATCH_DOCUMENTS, part.end)]
                for i, ids in enumerate(tokenizer.encode_batch(texts), start - part.first):
                    file.write(np.array(ids, dtype=dtype).tobytes())
                    offsets[i + 1] = offsets[i] + np.uint64(len(ids))
                tell(len(texts))
        with open(offsets_tmp, "wb") as file:
            np.save(file, offsets, allow_pickle=False)
        for temporary, path in ((tokens_tmp, tokens_path), (offsets_tmp, offsets_path)):
            fsync_path(temporary)
            os.replace(temporary, path)


def open_part(
    folder: Path, name: str, dtype: np.dtype, *, num_documents: int, num_tokens: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A part's tokens and offsets, mapped, after a look at their sizes.

    A mapped file that is cut later ends the process that reads behind its new end, with SIGBUS. So a file that is short
    already must not get that far, whether or not anybody hashed it.

    Raises:
        ValueError: they do not hold so many documents and tokens.
        OSError: a file is missing.
    """
    path = folder / f"{name}.offsets.npy"
    with open(path, "rb") as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):
            raise ValueError(f"its array format is {version}")
        _, _, kind = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    offsets = _mapped(path, kind, start)
    tokens = _mapped(folder / f"{name}.tokens", dtype, 0)
    if len(offsets) != num_documents + 1 or len(tokens) != offsets[-1] or num_tokens not in (None, len(tokens)):
        raise ValueError(f"{name} holds {len(tokens):,} tokens and {len(offsets):,} offsets, other than it should")
    return tokens, offsets


def is_finished(folder: Path, part: Part, dtype: np.dtype) -> bool:
    """Whether both files of a part are there in full."""
    try:
        open_part(folder, part.name, dtype, num_documents=part.num_documents)
    except (OSError, ValueError):
        return False
    return True


def _mapped(path: Path, dtype: np.dtype, start: int) -> np.ndarray:
    """A file's values from a byte on, mapped.

    Not by `np.memmap`, which keeps a file open for as long as it is mapped: a large dataset has thousands of parts, and
    a process may often have 1 024 files open.
    """
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return np.frombuffer(file.read_buffer(), dtype=dtype, offset=start)


def hash_parts(folder: Path, names: Sequence[str], tell: Callable[[int], None]) -> list[str]:
    """The hash of each part.

    Args:
        tell: called several times a second with the number of parts that are done; what it raises ends the work.

    Raises:
        OSError: a file is missing.
    """
    pool = ThreadPoolExecutor()  # hashing lets other threads run
    try:
        hashes = [pool.submit(_hash_part, folder, name) for name in names]
        pending = set(hashes)
        while pending:
            _, pending = wait(pending, timeout=POLL_S)
            tell(len(hashes) - len(pending))
        return [found.result() for found in hashes]
    finally:
        pool.shutdown(cancel_futures=True)  # waits for those that were begun, a moment each


def _hash_part(folder: Path, name: str) -> str:
    files = (folder / f"{name}.tokens", folder / f"{name}.offsets.npy")
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()
