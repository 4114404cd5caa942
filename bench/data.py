"""How fast text becomes batches: plan, rows, the wait of a training step, and the token cache.

    OMP_NUM_THREADS=1 python bench/data.py

Speeds of packing are tokens a second of one process, of its CPU time where it says so. Documents have log-normal
lengths with the mean of web text. Prints one JSON object.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.prefetch import Prefetcher
from picollm.data.token_source import CachedTokens
from picollm.data.toy_world import documents
from picollm.hardware import usable_cpus
from picollm.tokenizer import cache
from picollm.tokenizer.train import train

T, BUFFER, BOS = 2048, 1000, 32_759
ROWS = 256  # a step of half a million tokens
DOCUMENTS, MEAN_TOKENS, SIGMA = 60_000, 800, 1.0
LISTS = 4000  # of them as lists of integers, for the comparison
SECONDS = 4.0
PACE = 1_000_000  # tokens a second that the fake trainer takes
TEXT_CHARS = 40_000_000


def write_tokens(folder: Path) -> CachedTokens:
    """A part of a cache with random tokens, memory-mapped."""
    random = np.random.default_rng(0)
    sizes = np.maximum(1, random.lognormal(np.log(MEAN_TOKENS) - SIGMA**2 / 2, SIGMA, DOCUMENTS)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    random.integers(0, BOS, int(sizes.sum()), dtype=np.uint16).tofile(folder / "tokens")
    return CachedTokens([(np.memmap(folder / "tokens", dtype=np.uint16, mode="r").view(np.ndarray), offsets)])


def make_packer(tokens: CachedTokens, packing: str = "best_fit") -> RowPacker:
    return RowPacker(Mixture([tokens], [1.0], 1), length=T, bos=BOS, seed=1, buffer_size=BUFFER, packing=packing)


def per_cpu_second(make_step: Callable[[], object], tokens_of_step: int) -> float:
    make_step()
    started, steps = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        make_step()
        steps += 1
    return round(steps * tokens_of_step / (time.process_time() - started))


def batches(tokens: CachedTokens, world: int = 1, packing: str = "best_fit") -> Batches:
    return Batches(make_packer(tokens, packing), rows_per_step=ROWS, device_batch_size=32, rank=0, world=world)


def copies_of_documents(tokens: CachedTokens) -> Callable[[], object]:
    """A step built the simple way (FACTS 2.6): a list of tokenised documents, one `torch.tensor` for each piece placed,
    a scan of the buffer for each, the shortest cropped where none fits."""
    lists = []  # as a tokenizer gives them; making them is not measured
    for document, size in enumerate(tokens.lengths(range(LISTS))):
        ids, mask = np.empty(size, np.int64), np.empty(size, bool)
        tokens.copy(document, 0, ids, mask)
        lists.append([BOS, *ids.tolist()])
    draws, buffer = cycle(lists), []

    def refill() -> None:
        while len(buffer) < BUFFER:
            buffer.append(next(draws))

    def step() -> object:
        rows = torch.empty((ROWS, T + 1), dtype=torch.long)
        for row in rows:
            at = 0
            while at <= T:
                refill()
                room = T + 1 - at
                fitting = [i for i, document in enumerate(buffer) if len(document) <= room]
                if fitting:
                    document = buffer.pop(max(fitting, key=lambda i: len(buffer[i])))
                else:
                    document = buffer.pop(min(range(len(buffer)), key=lambda i: len(buffer[i])))[:room]
                row[at : at + len(document)] = torch.tensor(document, dtype=torch.long)
                at += len(document)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return step


def waits(tokens: CachedTokens, steps: int = 12) -> dict[str, float]:
    """A trainer that takes PACE tokens a second, through the real prefetcher."""
    prefetcher = Prefetcher(batches(tokens), steps, torch.device("cpu"))
    prefetcher.next()
    first = prefetcher.wait_s
    for _ in range(steps - 1):
        time.sleep(ROWS * T / PACE)
        prefetcher.next()
    prefetcher.close()
    return {"first_step_s": round(first, 4), "all_later_steps_s": round(prefetcher.wait_s - first, 4)}


def build_cache(base: Path) -> dict[str, Any]:
    """Tokenising a dataset into a new cache, all processes together, and opening it again."""
    with DatasetWriter("bench", base) as writer:
        writer.start("text")
        chars, texts = 0, list(documents(4000, 1))
        while chars < TEXT_CHARS:
            for text in texts:
                writer.add("train", text)
                chars += len(text)
        writer.add("validation", "held back")
        writer.publish({"from": "bench/data.py"})
    dataset, tokenizer = Dataset.open("bench", base), train(iter(texts), 2048)
    started = time.perf_counter()
    made = cache.build(base, dataset, tokenizer, processes=usable_cpus(), limit_bytes=2**40)
    build_s = time.perf_counter() - started
    started = time.perf_counter()
    cache.open_cache(base, dataset, tokenizer)
    open_s = time.perf_counter() - started
    size = sum(path.stat().st_size for path in cache.cache_dir(base, dataset, tokenizer).iterdir())
    tokens = sum(made.lengths(range(made.num_documents)))
    return {
        "processes": usable_cpus(),
        "chars": chars,
        "tokens": tokens,
        "chars_per_s": round(chars / build_s),
        "tokens_per_s": round(tokens / build_s),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 3),
        "verify_and_open_s": round(open_s, 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokens = write_tokens(Path(folder))
        result: dict[str, Any] = {"row": T, "rows_per_step": ROWS, "buffer": BUFFER}
        for packing in ("best_fit", "concat", "documents"):
            packer = make_packer(tokens, packing)
            plan = per_cpu_second(lambda p=packer: ([p.plan_row() for _ in range(ROWS)], p.forget()), ROWS * T)
            step = batches(tokens, packing=packing)
            result[packing] = {
                "plan_tokens_per_cpu_s": plan,
                "plan_and_gather_tokens_per_cpu_s": per_cpu_second(step.next_step, ROWS * T),
                "cut_share": round(step.packer.cut_share, 4),
            }
        # Every rank plans all rows and gathers its own: what one of eight does for a step of the whole run.
        result["rank_0_of_8_tokens_per_cpu_s"] = per_cpu_second(batches(tokens, 8).next_step, ROWS * T)
        simple = per_cpu_second(copies_of_documents(tokens), ROWS * T)
        ours = result["best_fit"]["plan_and_gather_tokens_per_cpu_s"]
        result["copies_of_documents"] = {"tokens_per_cpu_s": simple, "ours_is_faster_by": round(ours / simple, 1)}
        result["waits_at_1M_tokens_per_s"] = waits(tokens)
        result["cache"] = build_cache(Path(folder))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
