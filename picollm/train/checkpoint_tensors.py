"""Tensors in and out of a checkpoint folder: read in slices, and compared with what they should be before that.

A hash proves only that whoever wrote a file also wrote its hash. So names and shapes are read from the headers, whose
sizes safetensors holds against the file's, and nothing is allocated for a tensor that is not really there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from picollm.config.model import Architecture
from picollm.errors import IntegrityError
from picollm.files import disk_errors, fsync_path
from picollm.model.gpt import GPT
from picollm.optim.sharding import Shard
from picollm.train.checkpoint_files import RESTORE
from picollm.train.checkpoint_parts import Entry, Part

WEIGHTS = "model.safetensors"
# (name, first row, end row) -> these rows of a tensor of the training state
Read = Callable[[str, int, int], Tensor]
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CHUNK_BYTES = 4 << 20
# Torch rounds pinned memory up to a power of two, tensor by tensor; so tensors share blocks of this size.
BLOCK_BYTES = 1 << 30
_ALIGNMENT = 64


# -- writing ----------------------------------------------------------------------------------------------------------


def host_buffers(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like these in host memory, not filled; pinned for those of a GPU, which then copies without the host."""
    buffers: dict[str, Tensor] = {}
    sizes = {name: -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for name, tensor in named.items()}
    left = sum(sizes.values())
    block, start = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in sorted(named.items(), key=lambda item: -item[1].nbytes):
        if start + sizes[name] > block.numel():
            size = max(sizes[name], min(BLOCK_BYTES, left))
            block, start = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda), 0
        buffers[name] = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start, left = start + sizes[name], left - sizes[name]
    return buffers


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors as a safetensors file, on the disk when this returns. Returns its sha256.

    One tensor of a GPU is in host memory at a time.

    Not by the library: before its version 0.8 it copies everything and keeps the interpreter locked meanwhile, so that
    training would stand still; and here the hash is taken in passing. The header says nothing of time, host or path.

    Raises:
        HostError: the disk is full or cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        for first in range(0, len(data), _CHUNK_BYTES):
            chunk = data[first : first + _CHUNK_BYTES]
            digest.update(chunk)
            file.write(chunk)

    with disk_errors(path):
        with open(path, "wb") as file:
            put(len(text).to_bytes(8, "little") + text)
            for name in order:
                put(_raw(tensors[name]))
        fsync_path(path)
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, where they are if that is host memory."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write_part(path: Path, tensors: dict[str, Tensor], where: dict[str, dict[str, list[int]]]) -> Part:
    """Write one rank's share of the training state."""
    sha256 = write_tensors(path, tensors)
    with disk_errors(path):
        fsync_path(path.parent)
        return Part(path.name, path.stat().st_size, sha256, where)


# -- reading ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped: tensors are read when they are asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"`{path}` cannot be read as safetensors", cause=str(error), hint=RESTORE) from error


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a file.

    Raises:
        IntegrityError: it cannot be read.
    """
    with open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def architecture_of(path: Path, meta: dict[str, Any]) -> Architecture:
    """The architecture that a checkpoint's meta describes.

    Raises:
        IntegrityError: none that this version knows.
    """
    try:
        return Architecture.model_validate(meta.get("model"))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise IntegrityError(
            f"`{path / 'meta.json'}` describes no model we know",
            cause=f"`{'.'.join(map(str, ('model', *detail['loc'])))}`: {detail['msg']}",
            hint=RESTORE,
        ) from error


def check_weights(path: Path, arch: Architecture) -> None:
    """Compare the weights' header with an architecture that came with them and may ask for any size.

    Raises:
        IntegrityError: the file cannot be read, or holds other tensors.
    """
    found = header(path / WEIGHTS)
    wrong = f"{arch.num_hidden_layers} layers do not have {len(found)} tensors"
    if arch.num_hidden_layers < len(found):  # a layer has several tensors; building billions of layers would not end
        try:
            with torch.device("meta"):
                expected = {name: tuple(tensor.shape) for name, tensor in GPT(arch).named_parameters()}
        except (RuntimeError, OverflowError, TypeError) as error:
            wrong = str(error).splitlines()[0]
        else:
            _compare(path, found, expected)
            return
    raise _misfit(path, wrong)


def _compare(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        first = differing[0]
        there, wanted = found.get(first, "missing"), expected.get(first, "unknown")
        raise _misfit(path, f"`{first}` is {there} there and {wanted} by its architecture")


def _misfit(path: Path, cause: str) -> IntegrityError:
    return IntegrityError(f"the weights in `{path}` do not fit its architecture", cause=cause, hint=RESTORE)


def load_weights(model: GPT, path: Path) -> None:
    """Copy a verified checkpoint's weights into a model of the same architecture, one tensor at a time.

    Raises:
        IntegrityError: names or shapes differ; the model is as it was.
    """
    parameters = dict(model.named_parameters())
    _compare(path, header(path / WEIGHTS), {name: tuple(p.shape) for name, p in parameters.items()})
    with open_tensors(path / WEIGHTS) as file, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))


def check_state(path: Path, index: dict[str, Entry], sums: dict[str, str], shards: Iterable[Shard]) -> None:
    """Compare the index of a training state with the files' headers, and with the shapes that an optimizer has.

    Args:
        sums: the verified files of the folder.
        shards: what this rank will want.

    Raises:
        IntegrityError: a file was not verified, or a tensor is missing or has another shape.
    """
    headers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, entry in index.items():
        for first, end, file in entry.parts:
            if f"state/{file}" not in sums:
                raise _state_misfit(path, f"`{name}` is in `{file}`, whose hash is not recorded")
            if file not in headers:
                headers[file] = header(path / "state" / file)
            found, wanted = headers[file].get(name), (end - first, *entry.shape[1:]) if entry.shape else ()
            if found != wanted:
                raise _state_misfit(path, f"`{name}` is {found or 'missing'} in `{file}` and {wanted} by the index")
    for shard in shards:
        if shard.name not in index:
            raise _state_misfit(path, f"it has no `{shard.name}`")
        if (found := index[shard.name].shape) != tuple(shard.shape):
            raise _state_misfit(path, f"`{shard.name}` is {found} there and {tuple(shard.shape)} in the optimizer")


def _state_misfit(path: Path, cause: str) -> IntegrityError:
    return IntegrityError(f"the optimizer state in `{path}` does not fit the model", cause=cause, hint=RESTORE)


@contextlib.contextmanager
def open_state(path: Path, index: dict[str, Entry]) -> Iterator[Read]:
    """A function that reads any rows of any tensor of the training state, from however many files hold them."""
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}

        def opened(file: str) -> Any:
            if file not in files:
                files[file] = stack.enter_context(open_tensors(path / "state" / file))
            return files[file]

        def read(name: str, start: int, end: int) -> Tensor:
            entry = index.get(name)
            if entry is None or not 0 <= start <= end <= entry.num_rows:
                raise _state_misfit(path, f"it has no rows {start} to {end} of `{name}`")
            if not entry.shape:
                return opened(entry.parts[0][2]).get_tensor(name)
            pieces = [
                opened(file).get_slice(name)[max(start, first) - first : min(end, last) - first]
                for first, last, file in entry.parts
                if max(start, first) < min(end, last)
            ]
            if not pieces:  # no rows asked for
                return opened(entry.parts[0][2]).get_slice(name)[0:0]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        yield read
