"""What our own model says, which an export is measured against, in the memory of one layer.

Loading the whole model for the comparison would cost more memory than writing the export did. So matrices of a layer
are read when it comes, of the embedding only the rows of tokens that occur, and of the head some rows at a time; and
logits are made of the positions that are asked for, because all of them are V / C times the stream they come from.

Letters: N positions, T time, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from picollm.export.folding import Checkpoint, read_tensor
from picollm.model.extras import soft_cap
from picollm.model.gpt import GPT
from picollm.train.checkpoint_tensors import WEIGHTS, open_tensors

_HEAD_ROWS_AT_ONCE = 8192


class Native:
    """Our model after some rows of ids, in float32.

    Rows of one length go through together: each length reads the layers once.

    Raises:
        IntegrityError: the weights cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> None:
        self._checkpoint = checkpoint
        self._stream = _stream(checkpoint, rows)

    def logits(self, places: Sequence[tuple[int, int]]) -> Float[Tensor, "N V"]:
        """Logits of the token after each place: number of a row, and a position in it."""
        return torch.cat([part for _, part in self._parts(places)], dim=-1)

    def leads(self, choices: Sequence[tuple[int, int, int]]) -> tuple[Float[Tensor, " N"], float]:
        """How well tokens were chosen.

        Args:
            choices: row, position, and a token after it.

        Returns:
            by how much the logit of the most likely token is above that of each choice, and the largest absolute
            logit at any of the positions.
        """
        if not choices:
            return torch.zeros(0), 0.0
        tokens = torch.tensor([token for *_, token in choices])
        best = torch.full(tokens.shape, -torch.inf)
        chosen = torch.empty(tokens.shape)
        largest = 0.0
        for first, part in self._parts([(row, position) for row, position, _ in choices]):
            best = torch.maximum(best, part.amax(-1))
            largest = max(largest, float(part.abs().max()))
            here = (tokens >= first) & (tokens < first + part.size(-1))
            chosen[here] = part[here, tokens[here] - first]
        return best - chosen, largest

    @torch.inference_mode()
    def _parts(self, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        """(first token, logits (N, some of V)), over the whole vocabulary."""
        arch = self._checkpoint.arch
        stream = torch.stack([self._stream[row][position] for row, position in places])
        for first in range(0, arch.vocab_size, _HEAD_ROWS_AT_ONCE):
            rows = slice(first, min(first + _HEAD_ROWS_AT_ONCE, arch.vocab_size))
            # Mapped for these rows only: pages that were read count as this process's memory while they are.
            with open_tensors(self._checkpoint.path / WEIGHTS) as file:
                head = file.get_slice("lm_head")[rows].to(torch.float32, copy=True)
            yield first, soft_cap(F.linear(stream, head), arch.final_logit_softcapping)


def native_logits(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, "T V"]]:
    """float32 logits of every position of each row, by our own model.

    Raises:
        IntegrityError: the weights cannot be read.
    """
    native = Native(checkpoint, rows)
    return [native.logits([(i, position) for position in range(len(row))]) for i, row in enumerate(rows)]


@torch.inference_mode()
def _stream(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, "T C"]]:
    """What the head reads, at every position of each row."""
    # Ids that occur, in order; the model below has a vocabulary of these alone.
    used = torch.tensor(sorted({token for row in rows for token in row}))
    model = _streamed(checkpoint, used)
    found: dict[int, Float[Tensor, "T C"]] = {}
    for length in sorted({len(row) for row in rows}):
        members = [i for i, row in enumerate(rows) if len(row) == length]
        ids = torch.searchsorted(used, torch.tensor([list(rows[i]) for i in members]))
        found |= dict(zip(members, model.hidden(ids), strict=True))
    return [found[i] for i in range(len(rows))]


def _streamed(checkpoint: Checkpoint, used: Int[Tensor, " N"]) -> GPT:
    """The model up to its head, with its layers' matrices on no device but while they are needed.

    Args:
        used: ids whose rows of the embeddings it has; it reads the number of an id in here.
    """
    path = checkpoint.path / WEIGHTS
    with torch.device("meta"):
        model = GPT(checkpoint.arch)
    inside = {
        f"layers.{i}.{part}": getattr(block, part)
        for i, block in enumerate(model.layers)
        for part in ("attention", "mlp")
    }
    for name, parameter in model.named_parameters():
        if name == "embed_tokens" or name.startswith("value_embeds."):
            _set(model, name, _rows(path, name, used))
        elif name == "lm_head" or name.startswith(tuple(inside)):
            parameter.requires_grad_(False)
        else:
            _set(model, name, read_tensor(path, name))

    def load(prefix: str) -> None:
        module = inside[prefix]
        for name, _ in list(module.named_parameters()):
            _set(module, name, read_tensor(path, f"{prefix}.{name}"))

    def drop(prefix: str) -> None:
        module = inside[prefix]
        for name, parameter in list(module.named_parameters()):
            _set(module, name, torch.empty_like(parameter, device="meta"))

    for prefix, module in inside.items():
        module.register_forward_pre_hook(lambda *_, prefix=prefix: load(prefix))
        module.register_forward_hook(lambda *_, prefix=prefix: drop(prefix))
    return model.eval()


def _rows(path: Path, name: str, ids: Int[Tensor, " N"]) -> Float[Tensor, "N W"]:
    """Rows of a table in float32; of the mapped file only their pages are read."""
    with open_tensors(path) as file:
        return file.get_tensor(name)[ids].to(torch.float32)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another tensor; one in an `nn.ParameterDict` too."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    parameter = nn.Parameter(value, requires_grad=False)
    if isinstance(owner, nn.ParameterDict):
        owner[last] = parameter
    else:
        setattr(owner, last, parameter)
