"""How good a tokenizer is: bytes per token by kind of text, exact round trips, tokens that nothing uses, speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from picollm.tokenizer.references import Reference
from picollm.tokenizer.samples import NASTY, SAMPLES
from picollm.tokenizer.special import SPECIALS
from picollm.tokenizer.tokenizer import StreamDecoder, Tokenizer

BATCH = 256


@dataclass(frozen=True)
class KindQuality:
    """One kind of text. More bytes per token is better: the model sees more text in the same window."""

    documents: int
    chars: int
    bytes: int
    tokens: int
    bytes_per_token: float


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found."""

    vocab_size: int
    sha256: str
    kinds: dict[str, KindQuality]
    round_trip_texts: int
    round_trip_failed: tuple[str, ...]
    """Texts that do not come back as they were, or whose bytes per token do not add up. Anything here is a defect."""
    unknown_bytes: int
    """Of the 256 byte values, how many have no token of their own: text with them could not be written."""
    unused_share: float
    """Share of the ordinary tokens that no text of `kinds` needs; honest only with much text."""
    chars_per_cpu_s: float | None
    """Characters encoded per second of CPU time, all threads added; None when too fast to measure."""
    beside: dict[str, dict[str, float]]
    """Name of another tokenizer -> kind -> its bytes per token on the same texts."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]], beside: Sequence[Reference] = ()) -> Quality:
    """Measure a tokenizer on texts by kind, beside the built-in samples of prose, code, numbers and other scripts.

    Args:
        texts: kind -> texts, such as `{"validation": documents}`; a kind without text is left out of the result.
        beside: other tokenizers whose tokens are counted on the same texts.
    """
    kinds: dict[str, KindQuality] = {}
    others: dict[str, dict[str, float]] = {reference.name: {} for reference in beside}
    seen: set[int] = set()
    failed: list[str] = []
    num_checked = 0
    cpu_s = 0.0
    for kind, stream in {**texts, **SAMPLES}.items():
        documents = chars = num_bytes = tokens = 0
        counts = dict.fromkeys(others, 0)
        for batch in _batches(stream):
            started = time.process_time()
            encoded = tokenizer.encode_batch(batch)
            cpu_s += time.process_time() - started
            for reference in beside:
                counts[reference.name] += reference.count(batch)
            for text, ids in zip(batch, encoded, strict=True):
                documents += 1
                chars += len(text)
                num_bytes += len(text.encode())
                tokens += len(ids)
                seen.update(ids)
                num_checked += 1
                if not _comes_back(tokenizer, text, ids):
                    failed.append(text)
        if tokens:
            kinds[kind] = KindQuality(documents, chars, num_bytes, tokens, num_bytes / tokens)
            for name, count in counts.items():
                others[name][kind] = num_bytes / count
    for text in NASTY:
        num_checked += 1
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        if not _comes_back(tokenizer, text, ids) or streamed != text:
            failed.append(text)
    ordinary = tokenizer.vocab_size - len(SPECIALS)
    single = {tokenizer.id_to_bytes(token) for token in range(ordinary) if tokenizer.token_bytes[token] == 1}
    total_chars = sum(kind.chars for kind in kinds.values())
    return Quality(
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
        kinds=kinds,
        round_trip_texts=num_checked,
        round_trip_failed=tuple(failed),
        unknown_bytes=256 - len(single),
        unused_share=(ordinary - len(seen)) / ordinary,
        chars_per_cpu_s=total_chars / cpu_s if cpu_s > 0 else None,
        beside=others,
    )


def _comes_back(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    """Same text, same number of bytes, and no special token, whatever the text says."""
    special = tokenizer.vocab_size - len(SPECIALS)
    return (
        tokenizer.decode(ids) == text
        and sum(tokenizer.token_bytes[token] for token in ids) == len(text.encode())
        and all(token < special for token in ids)
    )


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
