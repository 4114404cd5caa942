"""Decode speed of the engine: `python bench/decode.py [--threads N]` prints one line of JSON.

Random weights (the time does not depend on them), prompts of 24 tokens, 64 new tokens each, float32. CPU seconds are
user and system time of the process, so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator

import torch

from picollm.config.model import Architecture
from picollm.generate.engine import Engine
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.tokenizer.train import train

SHAPES = {
    "demo": {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 1024, "T": 128},
    "cpu-small": {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 8192, "T": 512},
}
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 24, 64, 3


def architecture(shape: str, vocab_size: int) -> Architecture:
    s = SHAPES[shape]
    heads = s["hidden_size"] // s["head_dim"]
    return Architecture(
        arch="portable", hidden_size=s["hidden_size"], num_hidden_layers=s["num_hidden_layers"],
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=s["head_dim"],
        intermediate_size=4 * s["hidden_size"], vocab_size=vocab_size, max_position_embeddings=s["T"],
        rope_theta=100_000.0,
    )  # fmt: skip


def random_words() -> Iterator[str]:
    """Text with enough different words for any of the vocabularies."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(4000)]
    for _ in range(3):
        yield " ".join(words)


def measure(engine: Engine, batch: int, sampling: Sampling) -> float:
    """Best tokens per CPU second of a few repeats, prefill included."""
    prompts = [[1 + (i * 7 + j) % 200 for j in range(PROMPT_TOKENS)] for i in range(batch)]
    best = 0.0
    for _ in range(REPEATS):
        started = time.process_time()
        tokens = sum(len(reply.ids) for reply in engine.generate(prompts, sampling))
        best = max(best, tokens / (time.process_time() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="demo")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train(random_words(), SHAPES[arguments.shape]["vocab_size"])
    model = GPT(architecture(arguments.shape, tokenizer.vocab_size)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        # No reply may end early: every one has to be NEW_TOKENS long.
        model.lm_head[min(tokenizer.special.values()) :] = 0
        model.lm_head[0] = 1
    speeds: dict[str, dict[str, int]] = {}
    for name, sampling in (
        ("greedy", Sampling(max_new_tokens=NEW_TOKENS)),
        ("sampled", Sampling(temperature=1.0, top_k=50, max_new_tokens=NEW_TOKENS)),
    ):
        speeds[name] = {}
        for batch in (1, 16, 64):
            engine = Engine(model, tokenizer, batch)
            speeds[name][str(batch)] = round(measure(engine, batch, sampling))
    print(
        json.dumps(
            {
                "bench": "decode",
                "shape": arguments.shape,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "vocab_size": tokenizer.vocab_size,
                "threads": arguments.threads,
                "attention": model.backend,
                "tokens_per_cpu_s": speeds,
                "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
