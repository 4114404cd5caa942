"""Named starting points. A preset says only what differs from the schema's defaults or must not drift with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A nested mapping of config values and what it is for, in one line."""

    description: str
    values: dict[str, dict[str, Any]]


def _gpu(depth: int, description: str) -> Preset:
    return Preset(
        description,
        {
            "data": {"dataset": "climbmix"},
            "tokenizer": {"vocab_size": 32_768},
            "model": {"depth": depth, "max_position_embeddings": 2048},
        },
    )


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        "about 1 M parameters on the built-in toy world: a chat model in minutes on one CPU core, offline",
        {
            "data": {"dataset": "toy-world"},
            "tokenizer": {"vocab_size": 1024},
            "model": {
                "depth": 4,
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "head_dim": 64,
                "max_position_embeddings": 128,
            },
            # Base rates: with the batch factor 0.8 and the width factor 2.45 they come out as .02, .05 and .004.
            "train": {
                "steps": 140,
                "batch_tokens": 2048,
                "matrix_lr": 0.025,
                "embedding_lr": 0.0255,
                "unembedding_lr": 0.00204,
            },
            "sft": {"steps": 560, "lr_scale": 0.6},
        },
    ),
    "cpu-small": Preset(
        "about 7 M parameters on your own text: minutes on a CPU",
        {
            "tokenizer": {"vocab_size": 8192},
            "model": {"depth": 4, "hidden_size": 256, "max_position_embeddings": 512},
            # Base rates of the table fit batches of half a million tokens. At this batch and horizon twice the matrix
            # rate and lower ones for embedding and head were best of six tried (PEPs: 1.577 instead of 1.589 bits).
            "train": {
                "steps": 360,
                "batch_tokens": 4096,
                "matrix_lr": 0.04,
                "embedding_lr": 0.2,
                "unembedding_lr": 0.004,
            },
            "sft": {"steps": 120, "lr_scale": 0.8},
        },
    ),
    "d12": _gpu(12, "135 M parameters, GPT-1 scale: a short run on one GPU"),
    "d20": _gpu(20, "477 M parameters: hours on one GPU"),
    "d24": _gpu(24, "780 M parameters, GPT-2 capability: hours on eight GPUs"),
    "d26": _gpu(26, "973 M parameters: hours on eight GPUs"),
    "d32": _gpu(32, "1.7 B parameters: a day on eight GPUs"),
}
