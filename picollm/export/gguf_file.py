"""A GGUF file read back: what stands in it, and whether that is what should.

Knows no torch but as values that are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from picollm.errors import IntegrityError
from picollm.export.gguf_table import Entry, Key
from picollm.export.gguf_types import Quant

if TYPE_CHECKING:
    from torch import Tensor

# Values of a tensor that are compared at a time, so that a large one is not there twice in float32.
_COMPARED_AT_ONCE = 1 << 20


def open_file(path: Path) -> gguf.GGUFReader:
    """A GGUF file, mapped.

    Raises:
        IntegrityError: it is none, or torn.
    """
    try:
        return gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise IntegrityError(f"`{path}` cannot be read as GGUF", cause=str(error), hint="export it again") from error


def float_matrices(path: Path) -> list[str]:
    """Names of the matrices of a quantised file that were not quantised, because their rows fit no block."""
    kept = [tensor for tensor in open_file(path).tensors if len(tensor.shape) > 1]
    return [tensor.name for tensor in kept if tensor.tensor_type.name in ("F32", "F16", "BF16")]


def wrong_keys(path: Path, host: str, quant: Quant, metadata: dict[str, Key]) -> list[str]:
    """What of the file's metadata is not as in the table, each as one line; empty when all is."""
    found = {name: field.contents() for name, field in open_file(path).fields.items() if not name.startswith("GGUF.")}
    expected: dict[str, Any] = {name: _stored(key) for name, key in metadata.items()}
    expected |= {"general.architecture": host, "general.file_type": int(gguf.LlamaFileType[quant.file_type])}
    return [
        f"`{name}` is {_short(found.get(name, 'missing'))}, wanted was {_short(expected.get(name, 'no such key'))}"
        for name in sorted(expected.keys() | (found.keys() if quant.direct else set()))
        if found.get(name) != expected.get(name)
    ]


def _stored(key: Key) -> Any:
    """The value as the file's type holds it: a float has 32 bits there."""
    if isinstance(key.value, float):
        return float(np.float32(key.value))
    if isinstance(key.value, list):
        return [float(np.float32(item)) if isinstance(item, float) else item for item in key.value]
    return key.value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def tensor_errors(
    path: Path,
    quant: Quant,
    listed: list[Entry],
    wanted: Iterable[tuple[str, Tensor]],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, list[str]]:
    """Compare every tensor of the file with what it should hold.

    Args:
        wanted: name and values of each, in the order of `listed`.

    Returns:
        the largest error of a tensor (root mean square, relative to the tensor's own), and a line for each tensor that
        is missing, unknown, or of another type or shape.
    """
    stored = {tensor.name: tensor for tensor in open_file(path).tensors}
    names = {entry.name for entry in listed}
    wrong = [f"`{name}` is not in the table" for name in stored if name not in names]
    worst = 0.0
    for done, (entry, (name, tensor)) in enumerate(zip(listed, wanted, strict=True), start=1):
        assert name == entry.name
        found = stored.get(name)
        if found is None:
            wrong.append(f"`{name}` is missing")
            continue
        shape = tuple(int(size) for size in reversed(found.shape))
        kind = found.tensor_type.name
        if shape != entry.shape or (quant.direct and kind != entry.tensor_type):
            wrong.append(f"`{name}` is {kind} {shape}, wanted was {entry.tensor_type} {entry.shape}")
            continue
        worst = max(worst, _error(path, found, tensor))
        on_progress(done, len(listed))
    return worst, wrong


def _error(path: Path, found: gguf.ReaderTensor, tensor: Tensor) -> float:
    """Root mean square of the difference, relative to that of the tensor.

    The file is read, not mapped: pages of a mapping stay with the process while there is room.
    """
    rows = tensor.reshape(-1, tensor.size(-1)).numpy()
    width = found.data.shape[-1]  # of a row, in items of the file
    step = max(1, _COMPARED_AT_ONCE // rows.shape[1])
    difference = total = 0.0
    for first in range(0, len(rows), step):
        wanted = rows[first : first + step]
        offset = found.data_offset + first * width * found.data.dtype.itemsize
        stored = np.fromfile(path, found.data.dtype, count=len(wanted) * width, offset=offset)
        got = gguf.dequantize(stored.reshape(len(wanted), width), found.tensor_type)
        difference += float(np.square(got - wanted).sum(dtype=np.float64))
        total += float(np.square(wanted).sum(dtype=np.float64))
    if not np.isfinite(difference):
        return float("inf")
    return float(np.sqrt(difference / total)) if total else float(difference > 0)
