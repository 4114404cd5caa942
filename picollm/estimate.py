"""Bytes, seconds and dollars of a run, from shapes and what is known of the machine. Pure functions.

Estimates to plan with, not promises: time within a factor of two where nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from picollm import hardware
from picollm.config.model import Architecture
from picollm.config.schema import RunConfig
from picollm.hardware import Machine
from picollm.scaling import Params, flops_per_token, num_params

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
# An interpreter with torch loaded and its allocator warm; on a GPU the CUDA context.
BASE_BYTES = {"cpu": 400 * 2**20, "cuda": 600 * 2**20}
# Elements of logits alive at once; `model/functional.py` works in chunks of as many, a test compares.
LOGITS_PER_CHUNK = 1 << 22
# What allocators hold beyond live tensors, and short-lived gradients: peak over saved tensors, measured on CPU.
ALLOCATOR_FACTOR = {"cpu": 1.25, "cuda": 1.1}
# Share of peak that a compiled GPU step reaches; GPU.md 1.3 expects 0.53 to 0.60 and no chip was measured yet.
GPU_UTILISATION = 0.5
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


@dataclass(frozen=True)
class Memory:
    """Peak of one training process, in bytes, by what holds it."""

    base: int
    weights: int
    gradients: int
    optimizer: int
    compute_copy: int
    activations: int
    logits: int
    update: int
    """Work space of the optimizer step, which comes when activations are gone."""

    @property
    def total(self) -> int:
        kept = self.base + self.weights + self.gradients + self.optimizer
        return kept + max(self.compute_copy + self.activations + self.logits, self.update)


def optimizer_bytes(params: Params) -> int:
    """State kept between steps: one float32 per matrix weight (Muon), two for everything else (AdamW)."""
    return 4 * params.matrices + 8 * (params.embedding + params.head + params.scalars)


def training_memory(arch: Architecture, dtype: str, device_batch_size: int, device: str, attention: str) -> Memory:
    """Estimate the peak of one training process; within 20 % of resident memory on CPU for three shapes.

    Weights and gradients are float32 (float64 in float64 runs); every linear keeps its weight in the compute type
    for backward. Per token a block keeps 5·C (residual stream and norms), 3·(H + K)·D (before and after the QK norm,
    values, output) and 2·(MLP width) (relu and its square): 38·C bytes in bf16 for plain shapes, where GPU.md 1.2
    counts 39 compiled. Without compile (CPU), bf16 norms keep float32 copies of their inputs: 46·C. Matmul attention
    adds its probabilities, H·T a token.

    Args:
        device_batch_size: rows in one forward pass.
        device: `cpu` or `cuda`.
        attention: `matmul` or `sdpa`.
    """
    params, size = num_params(arch), ITEMSIZE[dtype]
    master = max(4, size)
    tokens = device_batch_size * arch.max_position_embeddings
    hidden, heads = arch.hidden_size, (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim
    kept = size * (5 * hidden + 3 * heads + 2 * arch.intermediate_size)
    if device == "cpu" and size < 4:
        kept += (4 - size) * (2 * hidden + heads)
    if attention == "matmul":
        kept += size * arch.num_attention_heads * arch.max_position_embeddings
    chunk = min(tokens * arch.padded_vocab_size, max(LOGITS_PER_CHUNK, 16 * arch.padded_vocab_size))
    # Logits, probabilities and gradient of a chunk; the head's gradient, gathered beside the one of earlier passes.
    logits = chunk * (2 * size + master) + params.head * (master + size)
    slack = ALLOCATOR_FACTOR[device]
    largest_stack = (
        arch.num_hidden_layers * hidden * max(arch.intermediate_size, arch.num_attention_heads * arch.head_dim)
    )
    return Memory(
        base=BASE_BYTES[device],
        weights=master * params.total,
        gradients=master * params.total,
        optimizer=optimizer_bytes(params) * master // 4,
        compute_copy=size * params.scaling if size < master else 0,
        activations=int(slack * tokens * arch.num_hidden_layers * kept),
        logits=int(slack * logits),
        update=4 * master * largest_stack,
    )


def training_speed(arch: Architecture, machine: Machine, dtype: str, threads: int, ranks: int = 1) -> float:
    """Tokens a second of a training step, all ranks together.

    A GPU reaches a usual share of its peak. A CPU takes its matrix rate plus a time per channel that small shapes feel
    most: on one Zen 4 thread 13,100 tokens/s for `demo` and 3,300 for `cpu-small` in bfloat16 (measured 13,900 and
    3,680), 1,620 for `cpu-small` in float32 (measured 1,757).
    """
    if machine.gpus:
        spec = hardware.gpu_spec(machine.gpus[0].name)
        # An unknown chip is planned as a middling one.
        peak = spec.peak_flops(dtype) if spec else 100e12
        return GPU_UTILISATION * peak * ranks / flops_per_token(arch)
    # Threads beyond the cores add nothing.
    busy = max(1, min(threads * ranks, machine.physical_cores))
    products_s = flops_per_token(arch) / hardware.cpu_matmul_flops(machine, dtype)
    return busy / (products_s + CPU_TIME_PER_CHANNEL_S * arch.num_hidden_layers * arch.hidden_size)


def training_time(tokens: int, speed: float) -> float:
    """Seconds of a training stage, start included; `speed` in tokens a second."""
    return TRAIN_START_TIME_S + tokens / speed


def tokenizer_time(chars: int) -> float:
    """Seconds to train a tokenizer (MEASURED 4: 3.1 M characters a second)."""
    return 1.0 + chars / TOKENIZER_CHARS_PER_S


def eval_time(config: RunConfig, chars: int, speed: float) -> float:
    """Seconds of bits per byte, samples, and twelve chat tasks on one model; `speed` is training's, in tokens a second.

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
    """Characters of a dataset that is not there yet: the toy world's, or enough for `tokens` without
    repeats."""
    return TOY_WORLD_CHARS if dataset == "toy-world" else int(tokens * CHARS_PER_TOKEN)


def dataset_bytes(chars: int) -> int:
    """Room a dataset of so many characters takes as compressed shards."""
    return int(chars * STORED_BYTES_PER_CHAR)


def price_per_hour(machine: Machine, ranks: int) -> float | None:
    """Dollars an hour for the GPUs in use, from the table of typical prices; None on CPUs and unknown chips."""
    if not machine.gpus:
        return None
    spec = hardware.gpu_spec(machine.gpus[0].name)
    return spec.usd_per_hour * ranks if spec else None
