"""Safetensors files of a model too large for memory: the layout is known beforehand, tensors are written as they come.

A model of one file is `model.safetensors`; a larger one is `model-00001-of-00003.safetensors` … and an index that
names the file of each tensor, as transformers reads them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from picollm.errors import ConfigError
from picollm.files import disk_errors, fsync_path, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what transformers takes too
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Shard:
    """One file: its name and the shapes of the tensors in it, in their order."""

    file: str
    shapes: dict[str, tuple[int, ...]]


def layout(shapes: dict[str, tuple[int, ...]], dtype: str, max_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Files for tensors in their order, each as full as it may be; a larger tensor has a file of its own."""
    size = getattr(torch, dtype).itemsize
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * size
        if groups[-1] and filled + bytes_ > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += bytes_
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


def num_bytes(shapes: dict[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes of all tensors in a type."""
    return sum(math.prod(shape) for shape in shapes.values()) * getattr(torch, dtype).itemsize


def write(
    folder: Path,
    shards: list[Shard],
    tensors: Iterable[tuple[str, Float[Tensor, "..."]]],
    dtype: str,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Write the files, and the index where there are several. Returns file -> sha256.

    Args:
        tensors: name and float32 values, in the order of `shards`.
        on_progress: called with bytes written and bytes in all.

    Raises:
        ConfigError: a value is not finite in this type.
        HostError: the disk is full or cannot be written.
    """
    total = sum(num_bytes(shard.shapes, dtype) for shard in shards)
    done = 0
    sums: dict[str, str] = {}
    stream = iter(tensors)
    for shard in shards:
        path = folder / shard.file
        digest = hashlib.sha256()
        with disk_errors(path), open(path, "wb") as file:

            def put(data: bytes | memoryview, file=file, digest=digest) -> None:
                digest.update(data)
                file.write(data)

            put(_header(shard, dtype))
            for name, shape in shard.shapes.items():
                found, tensor = next(stream)
                assert (found, tuple(tensor.shape)) == (name, shape), (found, name)
                for part in tensor.reshape(-1).split(_VALUES_AT_ONCE):
                    put(_bytes(name, part, dtype))
                    done += part.numel() * getattr(torch, dtype).itemsize
                    on_progress(done, total)
        with disk_errors(path):
            fsync_path(path)
        sums[shard.file] = digest.hexdigest()
    assert next(stream, None) is None
    if len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.shapes}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return sums


def _header(shard: Shard, dtype: str) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.shapes.items():
        start, end = end, end + math.prod(shape) * getattr(torch, dtype).itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(name: str, part: Tensor, dtype: str) -> memoryview:
    cast = part.to(getattr(torch, dtype)).contiguous()
    if not cast.isfinite().all():
        finite = bool(part.isfinite().all())
        raise ConfigError(
            f"`{name}` cannot be written as {dtype}",
            cause="a value is beyond the range of the type" if finite else "it holds a value that is no number",
            hint="export with `--dtype bfloat16` or `--dtype float32`"
            if finite
            else "export an earlier stage (`--stage pretrain`), or train again: this training diverged",
        )
    return memoryview(cast.view(torch.uint8).numpy())
