"""What `full` has beyond `portable`: each function is one feature, and what turns it on is a field of the architecture.

The features are nanochat's (found there in many sweeps); value embeddings go back to modded-nanogpt and Zhou et al.
2024, arXiv:2410.17897, soft caps on logits to Gemma 2, arXiv:2408.00118.

Letters: B batch, T time, C hidden size, K key/value heads, D head size, L layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from picollm.config.model import SMEAR_CHANNELS, Architecture


def extra_parameters(arch: Architecture) -> dict[str, nn.Parameter | nn.ParameterDict | None]:
    """The model's own parameters for features, by attribute name; None where the architecture lacks the feature."""

    def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(shape)) if wanted else None

    width = arch.num_key_value_heads * arch.head_dim
    tables = {str(i): nn.Parameter(torch.empty(arch.padded_vocab_size, width)) for i in arch.value_embedding_layers}
    return {
        "value_embeds": nn.ParameterDict(tables),
        "x0_lambdas": parameter(arch.x0_scalars, arch.num_hidden_layers),
        "smear_gate": parameter(arch.smear, min(SMEAR_CHANNELS, arch.hidden_size)),
        "smear_lambda": parameter(arch.smear, 1),
        "backout_lambda": parameter(arch.backout, 1),
    }


def initial_extra(name: str, shape: torch.Size, arch: Architecture, generator: torch.Generator) -> Tensor | None:
    """Start value of a parameter of a feature; None for any other name."""
    if name == "x0_lambdas":
        L = arch.num_hidden_layers
        return 0.20 - 0.15 * torch.arange(L) / max(1, L - 1)
    if name == "smear_lambda":
        return torch.zeros(shape)
    if name == "backout_lambda":
        return torch.full(shape, 0.2)
    if name == "smear_gate" or name.endswith("value_gate.weight"):
        return torch.empty(shape).uniform_(0, 0.02, generator=generator)
    if name.startswith("value_embeds."):
        bound = (3 / arch.hidden_size) ** 0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return None


def smear(
    x: Float[Tensor, "B T C"],
    previous: Float[Tensor, "B T C"],
    gate: Float[Tensor, " G"],
    strength: Float[Tensor, " 1"],
) -> Float[Tensor, "B T C"]:
    """Each token's embedding takes up some of the one before it; `previous` is zero at the start of a row."""
    share = torch.sigmoid(x[..., : gate.numel()] @ gate.to(x.dtype))  # (B, T)
    return x + (strength.to(x.dtype) * share).unsqueeze(-1) * previous


def shifted(x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
    """The row one position later, zero first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


def add_value_embedding(
    v: Float[Tensor, "B T K D"], embedding: Float[Tensor, "B T W"], gate: Float[Tensor, "B T K"]
) -> Float[Tensor, "B T K D"]:
    """Values plus the token's value embedding (W = K * D), through a gate per head that opens up to 3."""
    return v + (3 * torch.sigmoid(gate)).unsqueeze(-1) * embedding.view_as(v)


def soft_cap(logits: Float[Tensor, "... V"], cap: float | None) -> Float[Tensor, "... V"]:
    """cap * tanh(logits / cap), which stays within +-cap; unchanged where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
