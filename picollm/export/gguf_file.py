"""A GGUF file read back: what stands in it, and whether that is what should.

Knows no torch but as values that are handed in.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Stored:
    """Where a tensor of a file is.

    Attributes:
        shape: as torch has it.
        offset: of its first byte.
        dtype, width: items that the file's bytes are read as, and how many of them a row has.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    dtype: np.dtype
    width: int


@dataclass(frozen=True)
class Contents:
    """Keys and tensors of a file, without the values of the tensors."""

    keys: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def matrix_types(self) -> dict[str, int]:
        """Type -> number of the matrices that have it."""
        return dict(Counter(tensor.kind.name for tensor in self.tensors.values() if len(tensor.shape) > 1))

    @property
    def float_matrices(self) -> list[str]:
        """Names of the matrices whose values are in no blocks."""
        matrices = {name: tensor for name, tensor in self.tensors.items() if len(tensor.shape) > 1}
        return [name for name, tensor in matrices.items() if tensor.kind.name in ("F32", "F16", "BF16")]


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[gguf.GGUFReader]:
    """A GGUF file, mapped; what cannot be read inside is told as what it is.

    Raises:
        IntegrityError: it is none, or torn.
    """
    try:
        yield gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise IntegrityError(f"`{path}` cannot be read as GGUF", cause=str(error), hint="export it again") from error


def read(path: Path) -> Contents:
    """What is in a file; its reader, which takes 100 MB for a large vocabulary, is gone afterwards.

    Raises:
        IntegrityError: it is no GGUF file, or torn.
    """
    with open_file(path) as reader:
        return Contents(
            {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")},
            {
                tensor.name: Stored(
                    tensor.tensor_type,
                    tuple(int(size) for size in reversed(tensor.shape)),
                    int(tensor.data_offset),
                    tensor.data.dtype,
                    tensor.data.shape[-1],
                )
                for tensor in reader.tensors
            },
        )


def wrong_keys(found: dict[str, Any], host: str, quant: Quant, metadata: dict[str, Key]) -> list[str]:
    """What of a file's keys is not as in the table, each as one line; empty when all is."""
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
    stored: dict[str, Stored],
    quant: Quant,
    listed: list[Entry],
    wanted: Iterable[tuple[str, Tensor]],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, list[str]]:
    """Compare every tensor of the file with what it should hold.

    Args:
        stored: the tensors of `read`.
        wanted: name and values of each, in the order of `listed`.

    Returns:
        the largest error of a tensor (root mean square, relative to the tensor's own), and a line for each tensor that
        is missing, unknown, or of another type or shape.
    """
    names = {entry.name for entry in listed}
    wrong = [f"`{name}` is not in the table" for name in stored if name not in names]
    worst = 0.0
    for done, (entry, (name, tensor)) in enumerate(zip(listed, wanted, strict=True), start=1):
        assert name == entry.name
        found = stored.get(name)
        if found is None:
            wrong.append(f"`{name}` is missing")
            continue
        kind = found.kind.name
        if found.shape != entry.shape or (quant.direct and kind != entry.tensor_type):
            wrong.append(f"`{name}` is {kind} {found.shape}, wanted was {entry.tensor_type} {entry.shape}")
            continue
        worst = max(worst, _error(path, found, tensor))
        on_progress(done, len(listed))
    return worst, wrong


def _error(path: Path, found: Stored, tensor: Tensor) -> float:
    """Root mean square of the difference, relative to that of the tensor.

    The file is read, not mapped: pages of a mapping stay with the process while there is room.
    """
    rows = tensor.reshape(-1, tensor.size(-1)).numpy()
    step = max(1, _COMPARED_AT_ONCE // rows.shape[1])
    difference = total = 0.0
    for first in range(0, len(rows), step):
        wanted = rows[first : first + step]
        offset = found.offset + first * found.width * found.dtype.itemsize
        stored = np.fromfile(path, found.dtype, count=len(wanted) * found.width, offset=offset)
        got = gguf.dequantize(stored.reshape(len(wanted), found.width), found.kind)
        difference += float(np.square(got - wanted).sum(dtype=np.float64))
        total += float(np.square(wanted).sum(dtype=np.float64))
    if not np.isfinite(difference):
        return float("inf")
    return float(np.sqrt(difference / total)) if total else float(difference > 0)
