"""Seconds, dollars and disk of a run, from shapes and what is known of the machine. Pure functions.

Estimates to plan with, not promises: time within a factor of two where nothing was measured. `memory.py` has the rest.
"""

from __future__ import annotations

from picollm import hardware
from picollm.config.model import Architecture
from picollm.config.schema import RunConfig
from picollm.data.registry import REGISTRY
from picollm.gpu_specs import gpu_spec
from picollm.hardware import Machine
from picollm.memory import optimizer_bytes
from picollm.scaling import Params, flops_per_token

# Share of peak that a compiled GPU step reaches; GPU.md 1.3 expects 0.53 to 0.60 and no chip was measured yet.
GPU_UTILISATION = 0.5
# What 8-bit products gain at the widths where they are chosen (GPU.md 2a: 15 to 17 % at d24 to d26).
FP8_SPEED_UP = 1.15
# Share of a step's FLOPs that is left to the step itself where blocks are computed twice: 6 of 8 per weight.
CHECKPOINTING_SHARE = 0.75
# CPU-seconds of one Zen 4 thread, measured in 2026-11: an evaluation's process (interpreter, torch, weights) and
# everything of a training stage that is not a step (start, tokenizing, first checkpoint, validation at the end).
EVAL_START_TIME_S = 1.5
TRAIN_START_TIME_S = 3.0
REPORT_TIME_S = 3.0
# What a CPU needs beside the matrix products, per token, layer and channel: norms, rotation, copies, optimizer.
CPU_TIME_PER_CHANNEL_S = 0.075e-6
TOKENIZER_CHARS_PER_S = 2.5e6
TOY_WORLD_CHARS = 2_000_000
TOY_WORLD_CHAT_TOKENS = 400_000
CHARS_PER_TOKEN = 4.0
# Parquet with zstd stores text in about two fifths of its characters (ClimbMix: 250 M characters in 100 MB).
STORED_BYTES_PER_CHAR = 0.4
# What a usual line into a machine with a GPU brings (400 Mbit/s); the one thing here that nobody can look up offline.
DOWNLOAD_BYTES_PER_S = 50e6


def training_speed(
    arch: Architecture,
    machine: Machine,
    dtype: str,
    threads: int,
    ranks: int = 1,
    *,
    fp8: bool = False,
    checkpointing: bool = False,
) -> float:
    """Tokens a second of a training step, all ranks together.

    A GPU reaches a usual share of its peak. A CPU takes its matrix rate plus a time per channel that small shapes feel
    most: on one Zen 4 thread 13,100 tokens/s for `demo` and 3,300 for `cpu-small` in bfloat16 (measured 13,900 and
    3,680), 1,620 for `cpu-small` in float32 (measured 1,757).

    Args:
        threads: of each rank.
    """
    share = CHECKPOINTING_SHARE if checkpointing else 1.0
    if machine.gpus:
        spec = gpu_spec(machine.gpus[0].name)
        # An unknown chip is planned as a middling one.
        peak = spec.peak_flops(dtype) if spec else 100e12
        return GPU_UTILISATION * share * (FP8_SPEED_UP if fp8 else 1.0) * peak * ranks / flops_per_token(arch)
    # Threads beyond the cores add nothing.
    busy = max(1, min(threads * ranks, machine.physical_cores))
    products_s = flops_per_token(arch) / hardware.cpu_matmul_flops(machine, dtype)
    return share * busy / (products_s + CPU_TIME_PER_CHANNEL_S * arch.num_hidden_layers * arch.hidden_size)


def training_time(tokens: int, speed: float) -> float:
    """Seconds of a training stage, start included; `speed` in tokens a second."""
    return TRAIN_START_TIME_S + tokens / speed


def tokenizer_time(chars: int) -> float:
    """Seconds to train a tokenizer (MEASURED 4: 3.1 M characters a second)."""
    return 1.0 + chars / TOKENIZER_CHARS_PER_S


def eval_time(config: RunConfig, chars: int, speed: float) -> float:
    """Seconds of bits per byte, samples, and twelve chat tasks on one model; `speed` is one rank's in training.

    A forward pass is a third of a training step. Decoding a token of a batch of answers was measured to cost as much
    as training on it: it works on one position a time, in float32.
    """
    validation = min(chars / CHARS_PER_TOKEN * 0.05, float(config.eval.bpb_tokens or 10_000_000))
    answers = 12 * config.eval.questions * config.eval.max_new_tokens / 2
    return 3 * EVAL_START_TIME_S + (validation / 3 + answers) / speed


def disk(params: Params, keep_last: int) -> int:
    """Bytes of the checkpoints of pretraining and SFT, float32 weights and states, one more while it is written."""
    checkpoint = 4 * params.total + optimizer_bytes(params)
    return (2 * keep_last + 1) * checkpoint


def dataset_chars(dataset: str, tokens: int) -> int:
    """Characters of a dataset that is not there yet: the toy world's, or enough for `tokens` without repeats."""
    if known := REGISTRY.get(dataset):
        return known.shards_for(tokens) * known.shard_chars
    return TOY_WORLD_CHARS if dataset == "toy-world" else int(tokens * CHARS_PER_TOKEN)


def download_bytes(dataset: str, tokens: int) -> int:
    """What a run of so many tokens fetches of a dataset that is not there: its shards and the validation shard."""
    known = REGISTRY.get(dataset)
    return (known.shards_for(tokens) + 1) * known.shard_bytes if known else 0


def dataset_bytes(chars: int) -> int:
    """Room a dataset of so many characters takes as compressed shards."""
    return int(chars * STORED_BYTES_PER_CHAR)


def price_per_hour(machine: Machine, ranks: int) -> float | None:
    """Dollars an hour for the GPUs in use, from the table of typical prices; None on CPUs and unknown chips."""
    if not machine.gpus:
        return None
    spec = gpu_spec(machine.gpus[0].name)
    return spec.usd_per_hour * ranks if spec else None
