"""Training a tokenizer: speed, memory as text grows, and what more text is worth; each size in a process of its own.

    python bench/tokenizer.py TEXT.parquet … --chars 25e6,50e6,100e6,200e6
    python bench/tokenizer.py --distinct 1e6,2e6,4e6

The first reads documents of the column `text`, every fiftieth held out for bytes per token, and fits `peak - start =
a * chars ** b`. The second makes text in which every word is another one, the most that memory can grow, and gives
bytes per distinct word. Prints one JSON object; times are CPU-seconds of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from picollm.config.tokenizer import TokenizerConfig
from picollm.tokenizer.train import capped, train

HELD_OUT = 50
GOAL_CHARS = 2e9
DOC_CHARS = TokenizerConfig().doc_chars


def documents(files: list[Path], *, held_out: bool) -> Iterator[str]:
    number = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(256, columns=["text"]):
            for text in batch.column("text").to_pylist():
                number += 1
                if (number % HELD_OUT == 0) == held_out:
                    yield text


def all_different(words: int) -> Iterator[str]:
    """Documents of a thousand random words of eight letters, no two alike in practice."""
    letters = random.Random(0)
    for _ in range(0, words, 1000):
        yield " ".join("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(1000))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def one(files: list[Path], amount: int, vocab_size: int) -> dict[str, Any]:
    """Train once, in this process, on so many characters of the files, or on so many different words."""
    start_mib, chars, read_s = peak_mib(), 0, 0.0
    texts = documents(files, held_out=False) if files else all_different(amount)
    limit = amount if files else 1 << 60
    begun = time.process_time()

    def counted() -> Iterator[str]:
        nonlocal chars, read_s
        for text in capped(texts, max_chars=limit, doc_chars=DOC_CHARS):
            chars += len(text)
            yield text
        read_s = time.process_time() - begun

    wall = time.perf_counter()
    tokenizer = train(counted(), vocab_size)
    cpu_s = time.process_time() - begun
    found: dict[str, Any] = {
        "chars": chars,
        "vocab_size": tokenizer.vocab_size,
        "cpu_s": round(cpu_s, 1),
        "cpu_s_until_all_is_read": round(read_s, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "chars_per_cpu_s": round(chars / cpu_s),
        "start_mib": round(start_mib),
        "peak_mib": round(peak_mib()),
        "load": round(os.getloadavg()[0], 1),
    }
    if files:
        size = tokens = 0
        for text in capped(documents(files, held_out=True), max_chars=5_000_000, doc_chars=DOC_CHARS):
            size += len(text.encode())
            tokens += len(tokenizer.encode(text))
        found["bytes_per_token_held_out"] = round(size / tokens, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--chars", default="25e6,50e6,100e6,200e6")
    parser.add_argument("--distinct")
    parser.add_argument("--vocab-size", type=int, default=TokenizerConfig().vocab_size)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    files = [] if arguments.distinct else arguments.files
    if not files and not arguments.distinct:
        parser.error("name parquet files, or --distinct")
    if arguments.one:
        print(json.dumps(one(files, arguments.one, arguments.vocab_size)))
        return
    amounts = [int(float(part)) for part in (arguments.distinct or arguments.chars).split(",")]
    runs = []
    for amount in amounts:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(amount)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout))
    grown = [run["peak_mib"] - run["start_mib"] for run in runs]
    result: dict[str, Any] = {"runs": runs}
    if len(runs) > 1 and files:
        slope, offset = np.polyfit(np.log([run["chars"] for run in runs]), np.log(grown), 1)
        result["growth_exponent"] = round(float(slope), 3)
        result["predicted_gib_at_2e9_chars"] = round(float(np.exp(offset + slope * np.log(GOAL_CHARS))) / 2**10, 2)
    elif len(runs) > 1:
        slope = np.polyfit(amounts, grown, 1)[0]
        result["bytes_per_distinct_word"] = round(float(slope) * 2**20)
        result["distinct_words_in_24_gib"] = round(24 * 2**10 / float(slope))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
