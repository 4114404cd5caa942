"""The native logits that an export is measured against, in the memory of one layer.

Loading the whole model for the comparison would cost more memory than writing the export did.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from picollm.export.folding import Checkpoint, read_tensor
from picollm.model.gpt import GPT
from picollm.train.checkpoint_tensors import WEIGHTS


@torch.inference_mode()
def native_logits(checkpoint: Checkpoint, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, "T V"]]:
    """float32 logits of every position of each row, by our own model; matrices of a layer are read when it comes.

    Rows of one length go through together: each length reads the checkpoint once.

    Raises:
        IntegrityError: the weights cannot be read.
    """
    model = _streamed(checkpoint)
    found: dict[int, Float[Tensor, "T V"]] = {}
    for length in sorted({len(row) for row in rows}):
        members = [i for i, row in enumerate(rows) if len(row) == length]
        found |= dict(zip(members, model(torch.tensor([list(rows[i]) for i in members])), strict=True))
    return [found[i] for i in range(len(rows))]


def _streamed(checkpoint: Checkpoint) -> GPT:
    """The model with its layers' matrices on no device but while they are needed."""
    path = checkpoint.path / WEIGHTS
    with torch.device("meta"):
        model = GPT(checkpoint.arch)
    inside = {
        f"layers.{i}.{part}": getattr(block, part)
        for i, block in enumerate(model.layers)
        for part in ("attention", "mlp")
    }
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(inside)):
            _set(model, name, read_tensor(path, name))
        else:
            parameter.requires_grad_(False)

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


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter another tensor; one in an `nn.ParameterDict` too."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    parameter = nn.Parameter(value, requires_grad=False)
    if isinstance(owner, nn.ParameterDict):
        owner[last] = parameter
    else:
        setattr(owner, last, parameter)
