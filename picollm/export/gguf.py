"""A GGUF file for stock llama.cpp: written tensor by tensor, read back, and only then given its name.

What stands in it is `gguf_table.py`'s business.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from picollm.errors import ConfigError, HostError
from picollm.export import folding
from picollm.export.folding import Checkpoint
from picollm.export.gguf_table import Entry, Key, entries, keys, tensor_name
from picollm.export.gguf_types import Quant
from picollm.export.provenance import Provenance
from picollm.export.unready import require_room
from picollm.files import disk_errors
from picollm.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]

XIELU = {
    "alpha_p": folding.XIELU_ALPHA_P,
    "alpha_n": folding.XIELU_ALPHA_N,
    "beta": folding.XIELU_BETA,
    "eps": folding.XIELU_EPS,
}
LARGEST_F16 = 65504.0
QUANTISE_PROGRAM = "llama-quantize"
QUANTISE_HINT = (
    f"put llama.cpp's `{QUANTISE_PROGRAM}` on PATH (it is in its release archives and in most package managers' "
    "`llama.cpp`), or choose a type that picollm writes itself, as `--quant Q5_1`"
)


# -- the tensors ------------------------------------------------------------------------------------------------------


def tensors(checkpoint: Checkpoint, host: str, quant: Quant) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Name in the file and float32 values of each tensor, in the order of `gguf_table.entries`."""
    c = steepness(quant)
    up: Tensor | None = None
    for name, tensor in folding.folded(checkpoint, checkpoint.arch):
        if host == "qwen3" and name.endswith(".up"):
            up = tensor  # until `down` comes, which is the next
        elif host == "qwen3" and name.endswith(".down"):
            assert up is not None
            layer = name[: -len("down")]
            for kind, part in zip(("gate", "up", "down"), folding.swiglu(up, tensor, c), strict=True):
                yield tensor_name(layer + kind), part
            up = None
        else:
            yield tensor_name(name), tensor


def steepness(quant: Quant) -> float:
    """Of the gate that stands for relu(x)^2 in SwiGLU (MODEL 2.7): the steeper, the nearer.

    In blocks a steep gate costs precision; with F16 weights llama.cpp rounds activations to F16 too, which ends early.
    """
    if quant.is_float:
        return folding.SWIGLU_C_FLOAT16 if quant.name == "F16" else folding.SWIGLU_C
    return folding.SWIGLU_C_QUANTISED


def table(
    checkpoint: Checkpoint, tokenizer: Tokenizer, host: str, quant: Quant, provenance: Provenance
) -> tuple[dict[str, Key], list[Entry]]:
    """Every key and tensor that the file must have."""
    arch = checkpoint.arch
    listed = entries(folding.folded_shapes(arch), host, quant)
    return keys(arch, tokenizer, host, quant, provenance, XIELU), listed


def num_bytes(listed: list[Entry]) -> int:
    """Size of all tensors in their types."""
    total = 0
    for entry in listed:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.tensor_type]]
        total += int(np.prod(entry.shape)) // block * size
    return total


# -- writing ----------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    checkpoint: Checkpoint,
    host: str,
    quant: Quant,
    listed: list[Entry],
    metadata: dict[str, Key],
    *,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write the file, one tensor in memory at a time.

    Args:
        on_progress: called with bytes written and bytes in all.

    Raises:
        ConfigError: a value is not finite in its type.
        HostError: there is not enough room, or the disk fails.
    """
    total = num_bytes(listed)
    # What `llama-quantize` makes of the file stands beside it for a while.
    needed = total if quant.direct else int(total * (1 + quant.bits / 32))
    require_room(
        path, needed, "free room, name a file on another disk with `--out FILE`, or choose a smaller `--quant`"
    )
    writer = gguf.GGUFWriter(None, host)
    for name, key in metadata.items():
        getattr(writer, f"add_{key.kind}")(name, key.value)
    writer.add_file_type(gguf.LlamaFileType[quant.file_type if quant.direct else "ALL_F32"])
    for entry in listed:
        kind = gguf.GGMLQuantizationType[entry.tensor_type]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        bytes_ = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
    with disk_errors(path):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for entry, (name, tensor) in zip(listed, tensors(checkpoint, host, quant), strict=True):
                assert name == entry.name and tuple(tensor.shape) == entry.shape, name
                _check_finite(entry, tensor)
                data = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[entry.tensor_type])
                writer.write_tensor_data(data)
                done += data.nbytes
                on_progress(done, total)
        finally:
            writer.close()


def _check_finite(entry: Entry, tensor: Tensor) -> None:
    largest = max(map(abs, torch.stack(tensor.aminmax()).tolist()))  # no copy of the tensor; a NaN is both
    if not math.isfinite(largest):
        raise ConfigError(
            f"`{entry.name}` cannot be written",
            cause="it holds a value that is no number",
            hint="export an earlier stage (`--stage pretrain`), or train again: this training diverged",
        )
    if entry.tensor_type == "F16" and largest > LARGEST_F16:
        raise ConfigError(
            f"`{entry.name}` cannot be written as F16",
            cause=f"it holds {largest:.3g}, beyond the range of the type",
            hint="choose `--quant BF16` or `--quant F32`",
        )


def quantise(source: Path, target: Path, quant: Quant) -> None:
    """Make a K- or I-quant of an F32 file with llama.cpp's own program.

    Raises:
        HostError: the program is not on PATH, or it failed; its last lines are told.
    """
    program = find_program(quant)
    done = subprocess.run(
        [program, str(source), str(target), quant.name], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-4:]
        raise HostError(
            f"`{QUANTISE_PROGRAM}` could not make {quant.name}",
            cause="\n    ".join([f"exit code {done.returncode}; its last lines:", *lines]),
            hint="choose another type, as `--quant Q5_1`",
        )


def find_program(quant: Quant) -> str:
    """Where `llama-quantize` is.

    Raises:
        HostError: nowhere on PATH; the hint says how to get it.
    """
    if program := shutil.which(QUANTISE_PROGRAM):
        return program
    raise HostError(f"{quant.name} needs `{QUANTISE_PROGRAM}`", cause="there is none on PATH", hint=QUANTISE_HINT)
