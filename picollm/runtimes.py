"""Config and machine -> the runtime of each stage: how it is executed, the second half of its `config.json`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from picollm import hardware
from picollm.attention_choice import CUDNN_FAST_ATTENTION, AttentionChoice, AttentionDevice, attention_for
from picollm.config.model import Architecture
from picollm.config.recipe import EvalRuntime, TrainRecipe, TrainRuntime
from picollm.config.schema import RunConfig
from picollm.config.train import TrainConfig
from picollm.errors import ConfigError
from picollm.hardware import Machine
from picollm.memory import Memory, training_memory
from picollm.rates import check_batch
from picollm.units import size as in_words

# More tokens per forward pass gain nothing on a CPU and cost memory.
CPU_MICRO_BATCH_TOKENS = 2**13
# On a GPU the work that does not depend on tokens (weights cast, gradients accumulated) is a third of a per cent here.
GPU_MICRO_BATCH_TOKENS = 2**17
# Shares of memory that training may plan for: other programs need some, and estimates err.
CPU_MEMORY_SHARE = 0.5
GPU_MEMORY_SHARE = 0.9


# -- the machine ------------------------------------------------------------------------------------------------------


def device_of(machine: Machine) -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if machine.gpus else "cpu"


def attention_device(machine: Machine) -> AttentionDevice:
    """What is known of the machine's kernels before torch was asked: what its wheels bring is taken to be there.

    FA3 comes apart; the worker, which asks torch, finds it where it is.
    """
    if not machine.gpus:
        return AttentionDevice("cpu")
    capability = hardware.weakest_capability(machine)
    installed = frozenset({"flash", "varlen", "flex"})
    return AttentionDevice("cuda", capability=capability, cudnn=CUDNN_FAST_ATTENTION, installed=installed)


def attention_of(config: RunConfig, machine: Machine, arch: Architecture, dtype: str) -> AttentionChoice:
    """The kernels that a run will use here, as far as that is known before torch was asked.

    Raises:
        ConfigError: `model.attention` asks for one that cannot work.
    """
    device, requested = attention_device(machine), config.model.attention
    if requested == "fa3":  # whether its wheel is there, the worker will see
        device = replace(device, installed=device.installed | {"fa3"})
    return attention_for(arch, dtype, device, requested, documents=config.data.packing == "documents")


def choose_threads(config: RunConfig, machine: Machine, ranks_per_node: int = 1) -> tuple[int, str]:
    """CPU threads of each rank, and why."""
    if config.train.threads is not None:
        return config.train.threads, "`train.threads` asks for it"
    return hardware.default_threads(machine, ranks_per_node)


def check_ranks(machine: Machine, ranks_per_node: int) -> None:
    """Refuse more processes than this machine has GPUs: each rank needs one of its own. CPUs are shared.

    Raises:
        ConfigError: with the number that fits.
    """
    if machine.gpus and ranks_per_node > (there := len(machine.gpus)):
        devices = "1 GPU is" if there == 1 else f"{there} GPUs are"
        raise ConfigError(
            f"`--launch nproc={ranks_per_node}` asks for more processes than there are GPUs",
            cause=f"every process trains on a GPU of its own, and {devices} visible here",
            hint=f"use `--launch nproc={there}`, or make more visible (CUDA_VISIBLE_DEVICES, `picollm doctor`)",
        )


def memory_room(machine: Machine, ranks_per_node: int = 1) -> int:
    """Bytes that one training process may plan for; from installed memory, so that a plan is the same tomorrow."""
    if machine.gpus:
        return int(GPU_MEMORY_SHARE * min(gpu.memory_bytes for gpu in machine.gpus))
    return int(CPU_MEMORY_SHARE * machine.memory_bytes / ranks_per_node)


# -- memory -> device batch -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How a step is cut so that it fits into memory.

    Attributes:
        rows: in one forward pass on one rank.
        passes: forward passes that a step accumulates on each rank.
        memory: estimated peak of one training process.
    """

    rows: int
    passes: int
    activation_checkpointing: bool
    memory: Memory
    reason: str


def fit(
    config: RunConfig, machine: Machine, recipe: TrainRecipe, *, ranks: int = 1, ranks_per_node: int | None = None
) -> Fit:
    """The fewest passes a step whose estimated peak fits; blocks are computed twice only where not even one row fits.

    Large passes waste less on casting weights and accumulating gradients; computing blocks twice costs a third more
    products. `train.device_batch_size` and `train.activation_checkpointing` overrule either.

    Args:
        ranks: processes that train, on all nodes.
        ranks_per_node: those on this machine; None means all of them.

    Raises:
        ConfigError: the batch does not split over ranks, or not by `train.device_batch_size`; or the forced attention
            cannot work.
    """
    arch, train, device = recipe.model, config.train, device_of(machine)
    rows = _rows_of_rank(config, recipe, ranks)
    sizes = [train.device_batch_size] if train.device_batch_size else _sizes(rows, arch, device)
    asked = train.activation_checkpointing
    room = memory_room(machine, ranks_per_node or ranks)
    attention = attention_of(config, machine, arch, recipe.dtype)
    tried: list[tuple[int, bool, Memory]] = []
    for again in (False, True) if asked is None else (asked,):
        for size in sizes:
            memory = training_memory(
                arch,
                recipe.dtype,
                size,
                device,
                attention,
                passes=rows // size,
                fp8=recipe.fp8,
                ranks=ranks,
                checkpointing=again,
                gpu_bytes=min((gpu.memory_bytes for gpu in machine.gpus), default=None),
            )
            tried.append((size, again, memory))
            if memory.total <= room:
                return Fit(size, rows // size, again, memory, _why(len(tried), size, rows, again, train))
    size, again, memory = tried[-1]
    return Fit(
        size,
        rows // size,
        again,
        memory,
        f"estimated not to fit: {in_words(memory.total)} needed, {in_words(room)} may be used",
    )


def _rows_of_rank(config: RunConfig, recipe: TrainRecipe, ranks: int) -> int:
    """Rows of a step that one rank trains on."""
    row, asked = recipe.model.max_position_embeddings, config.train.device_batch_size
    key = "train.batch_tokens" if recipe.stage == "pretrain" or config.sft.batch_tokens is None else "sft.batch_tokens"
    on_ranks = f"on {ranks} ranks" if ranks > 1 else "on one rank"
    check_batch(key, recipe.batch_tokens, row * ranks, of=f"{row} tokens a row {on_ranks}")
    if asked is not None:
        of = f"{asked} rows (`train.device_batch_size`) of {row} tokens {on_ranks}"
        check_batch(key, recipe.batch_tokens, asked * row * ranks, of=of)
    return recipe.batch_tokens // row // ranks


def _sizes(rows: int, arch: Architecture, device: str) -> list[int]:
    """Rows in a pass that divide a rank's rows, largest first, as far as a larger pass gains something."""
    most = GPU_MICRO_BATCH_TOKENS if device == "cuda" else CPU_MICRO_BATCH_TOKENS
    divisors = [size for size in range(rows, 0, -1) if rows % size == 0]
    return [size for size in divisors if size * arch.max_position_embeddings <= most] or [1]


def _why(attempt: int, size: int, rows: int, again: bool, train: TrainConfig) -> str:
    if train.device_batch_size:
        return "`train.device_batch_size` asks for it"
    if again and train.activation_checkpointing is None:
        return "the most that fits, and only where blocks are computed twice"
    if attempt > 1:
        return "the most that is estimated to fit"
    return "the whole step fits in one pass" if size == rows else "larger passes gain nothing"


# -- runtimes ---------------------------------------------------------------------------------------------------------


def train_runtime(
    config: RunConfig, machine: Machine, recipe: TrainRecipe, *, ranks: int = 1, ranks_per_node: int | None = None
) -> TrainRuntime:
    """How a training stage is executed on this machine.

    Raises:
        ConfigError: as in `fit`.
    """
    train, fitted = config.train, fit(config, machine, recipe, ranks=ranks, ranks_per_node=ranks_per_node)
    return TrainRuntime(
        ranks=ranks,
        threads=choose_threads(config, machine, ranks_per_node or ranks)[0],
        device_batch_size=fitted.rows,
        # The worker resolves `auto`, by the device it really has.
        attention=config.model.attention,
        compile=device_of(machine) == "cuda" if train.compile is None else train.compile,
        activation_checkpointing=fitted.activation_checkpointing,
        checkpoint_every=train.checkpoint_every or checkpoint_cadence(recipe.steps),
        checkpoint_minutes=train.checkpoint_minutes,
        keep_last=train.keep_last,
        eval_every=train.eval_every or (250 if recipe.steps >= 1000 else None),
        eval_tokens=train.eval_tokens,
        cache_gib=config.data.cache_gib if recipe.stage == "pretrain" else 0.0,
    )


def checkpoint_cadence(steps: int) -> int:
    """About twenty checkpoints a run, 10 to 1 000 steps apart."""
    return min(1000, max(10, round(steps / 20)))


def eval_runtime(config: RunConfig, machine: Machine) -> EvalRuntime:
    """How an evaluation is executed on this machine."""
    return EvalRuntime(threads=choose_threads(config, machine)[0], batch_size=config.eval.batch_size)
