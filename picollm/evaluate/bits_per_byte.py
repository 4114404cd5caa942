"""How well a model compresses text: bits per byte, comparable between tokenizers.

bpb = sum of -log p over tokens with bytes / (ln 2 * sum of their bytes). Every byte of the text counts exactly once.
Letters: T time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from picollm.data.packing import IGNORED
from picollm.errors import ConfigError
from picollm.evaluate.nats import Ranks, nats_of_rows, rows_per_pass
from picollm.model.gpt import GPT
from picollm.tokenizer.tokenizer import Tokenizer

# Rows sorted by length at a time: enough to fill passes with equal rows, few enough for a dataset of any size.
WINDOW_ROWS = 4096
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
    batch_size: int | None = None,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> BitsPerByte:
    """Bits per byte of `documents` under `model`, with contexts of at most T tokens; see `score`.

    Args:
        max_tokens: tokens to score; None scores all.

    Raises:
        ConfigError: the documents hold no byte.
    """
    return score(model, tokenizer, rows(tokenizer, documents, T, max_tokens), T, batch_size, on_progress)


def score(
    model: GPT,
    tokenizer: Tokenizer,
    cut: Iterable[tuple[int, np.ndarray]],
    T: int,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
) -> BitsPerByte:
    """Bits per byte of documents as `rows` cuts them, the same on every rank and on any number of them.

    Rows of similar length share a pass, so that little padding is computed.

    Args:
        cut: all rows, on every rank; the order of documents is kept.
        T: tokens of the longest row; a token sees bos and the tokens before it in its row.
        batch_size: rows per forward pass at most; None takes what suits the device, see `rows_per_pass`.
        on_progress: called after each round of passes with the documents scored so far, by their share of a window's
            tokens since rows are not scored in order; what it raises ends the job, see `nats_of_rows`.
        ranks: those that take part; None for this process alone.

    Raises:
        ConfigError: the documents hold no byte.
    """
    token_bytes = np.array(tokenizer.token_bytes, dtype=np.int64)
    nats: list[float] = []
    num_bytes: list[int] = []
    tokens = 0
    per_pass = rows_per_pass(model, T)
    per_pass = per_pass if batch_size is None else min(batch_size, per_pass)
    source = iter(cut)
    while window := list(islice(source, WINDOW_ROWS)):
        before = len(nats)
        grow = window[-1][0] + 1 - before
        nats += [0.0] * grow
        num_bytes += [0] * grow
        window.sort(key=lambda entry: len(entry[1]))
        # Tokens without bytes carry no text: their loss must not count either.
        pairs = [(row[:-1], np.where(token_bytes[row[1:]] > 0, row[1:], IGNORED)) for _, row in window]
        look = None
        if on_progress is not None:
            passed = np.cumsum([len(ids) for ids, _ in pairs])
            look = partial(_tell, on_progress, before, grow, passed)
        scored = nats_of_rows(model, pairs, per_pass, ranks, look).tolist()
        for (document, row), (_, targets), row_nats in zip(window, pairs, scored, strict=True):
            nats[document] += row_nats
            num_bytes[document] += int(token_bytes[row[1:]].sum())
            tokens += int((targets >= 0).sum())
    if not sum(num_bytes):
        raise ConfigError("there is no text to measure bits per byte on", cause="the documents hold no byte")
    bpb, stderr = _ratio(nats, num_bytes)
    return BitsPerByte(bpb, stderr, math.fsum(nats), sum(num_bytes), tokens, len(nats))


def _tell(on_progress: Callable[[int], None], before: int, grow: int, passed: np.ndarray, done: int) -> None:
    """Rows of a window done -> documents, of which it adds `grow` to `before`; `passed` sums its rows' tokens up."""
    on_progress(before + grow * int(passed[done - 1]) // int(passed[-1]))


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
