"""How well a model compresses text: bits per byte, comparable between tokenizers.

bpb = sum of -log p over tokens with bytes / (ln 2 * sum of their bytes). Every byte of the text counts exactly once.
Letters: B rows of a batch, T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from picollm.data.packing import IGNORED
from picollm.errors import ConfigError
from picollm.model.gpt import GPT
from picollm.tokenizer.tokenizer import Tokenizer

# Rows sorted by length at a time: enough to fill batches of equal rows, few enough to hold any dataset.
WINDOW_ROWS = 4096
# Tokens in one forward pass: what a pass needs beside the weights grows with them, its speed hardly does.
PASS_TOKENS = 4096
# Documents per call of the tokenizer.
ENCODE_DOCUMENTS = 128


@dataclass(frozen=True)
class BitsPerByte:
    """A measurement over whole documents.

    Attributes:
        bpb: bits per byte.
        stderr: standard error of `bpb` with documents as the sample (ratio estimator); None for a single document.
        nats: total negative log-likelihood.
        bytes: UTF-8 bytes scored.
        tokens: tokens scored.
        documents: documents read.
    """

    bpb: float
    stderr: float | None
    nats: float
    bytes: int
    tokens: int
    documents: int


def rows(
    tokenizer: Tokenizer, documents: Iterable[str], T: int, max_tokens: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Cut documents into pieces of at most T tokens, each preceded by bos.

    Yields:
        index of the document and the row: bos and 1 to T tokens, int32.

    Args:
        max_tokens: stop after so many tokens, bos not counted; the document they end in is cut there.
    """
    index, left = 0, max_tokens
    source = iter(documents)
    while batch := list(islice(source, ENCODE_DOCUMENTS)):
        for ids in tokenizer.encode_batch(batch):
            if left is not None:
                ids = ids[:left]
                left -= len(ids)
            for start in range(0, len(ids), T):
                yield index, np.array([tokenizer.bos, *ids[start : start + T]], dtype=np.int32)
            index += 1
            if left == 0:
                return


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    T: int,
    batch_size: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> BitsPerByte:
    """Bits per byte of `documents` under `model`, with contexts of at most T tokens.

    Rows of similar length share a batch, so that little padding is computed.

    Args:
        T: tokens per piece; a token sees bos and the tokens before it in its piece.
        batch_size: rows per forward pass, fewer where they would be more than PASS_TOKENS.
        max_tokens: tokens to score; None scores all.
        on_progress: called with the documents scored so far after each batch, by their share of a window's tokens since
            rows are not scored in order; what it raises ends the pass.

    Raises:
        ConfigError: the documents hold no byte.
    """
    device = model.embed_tokens.device
    token_bytes = np.array(tokenizer.token_bytes, dtype=np.int64)
    nats: list[float] = []
    num_bytes: list[int] = []
    tokens = 0
    source = rows(tokenizer, documents, T, max_tokens)
    batch_size = max(1, min(batch_size, PASS_TOKENS // T))
    while window := list(islice(source, WINDOW_ROWS)):
        before, passed = len(nats), 0
        grow = window[-1][0] + 1 - before
        window_tokens = sum(len(row) - 1 for _, row in window)
        nats += [0.0] * grow
        num_bytes += [0] * grow
        window.sort(key=lambda entry: len(entry[1]))
        for start in range(0, len(window), batch_size):
            batch = window[start : start + batch_size]
            ids, targets = _pad([row for _, row in batch])
            sizes = np.where(targets >= 0, token_bytes[targets], 0)
            # Tokens without bytes carry no text: their loss must not count either.
            targets[sizes == 0] = IGNORED
            scored = model.nats(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
            totals = scored.sum(dim=1, dtype=torch.float64).tolist()
            for (document, _), row_nats, row_bytes in zip(batch, totals, sizes.sum(axis=1).tolist(), strict=True):
                nats[document] += row_nats
                num_bytes[document] += row_bytes
            tokens += int((targets >= 0).sum())
            if on_progress is not None:
                passed += sum(len(row) - 1 for _, row in batch)
                on_progress(before + grow * passed // window_tokens)
    if not sum(num_bytes):
        raise ConfigError("there is no text to measure bits per byte on", cause="the documents hold no byte")
    bpb, stderr = _ratio(nats, num_bytes)
    return BitsPerByte(bpb, stderr, math.fsum(nats), sum(num_bytes), tokens, len(nats))


def _pad(batch: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (B, T) of int64; right padding is an ignored target."""
    longest = max(len(row) for row in batch) - 1
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    targets = np.full((len(batch), longest), IGNORED, dtype=np.int64)
    for index, row in enumerate(batch):
        ids[index, : len(row) - 1] = row[:-1]
        targets[index, : len(row) - 1] = row[1:]
    return ids, targets


def _ratio(nats: list[float], num_bytes: list[int]) -> tuple[float, float | None]:
    """Bits per byte and its standard error over documents (Cochran 1977, Sampling Techniques, section 6.4)."""
    total = sum(num_bytes)
    rate = math.fsum(nats) / total
    count = len(nats)
    stderr = None
    if count > 1:
        residuals = math.fsum((n - rate * b) ** 2 for n, b in zip(nats, num_bytes, strict=True))
        stderr = math.sqrt(count / (count - 1) * residuals) / total / math.log(2)
    return rate / math.log(2), stderr
