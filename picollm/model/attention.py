"""The one door to attention.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def causal_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S K D"],
    v: Float[Tensor, "B S K D"],
    *,
    scale: float,
    backend: str,
    positions: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """Attend each query to its own position and all before it.

    Grouped queries (H a multiple of K) follow Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        scale: factor on the scores before the softmax.
        backend: `matmul` (scores in memory; fastest on CPU in bf16 at short T, where the backward pass of the
            library kernel is slow: bench/choices.py) or `sdpa`.
        positions: index of each query among the S keys, for decoding from a cache; None means S = T, query i at i.
    """
    groups = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, S, D)
    visible = None
    if positions is not None:
        visible = torch.arange(k.size(2), device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    if backend == "matmul":
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = _matmul_attention(q * scale, k, v, visible)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=groups > 1
        )
    return out.transpose(1, 2)  # (B, T, H, D)


# Queries are taken in blocks, each against the keys up to its end: at T = 4 blocks three eighths of the scores, which
# nobody may see, are never computed.
QUERY_BLOCK = 128


def _matmul_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S D"], visible: Tensor | None
) -> Float[Tensor, "B H T D"]:
    """softmax(q k^T) v with the scores in memory; `visible` None means causal."""
    if visible is not None:
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, float("-inf"))
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    k = k.transpose(-1, -2)
    parts = []
    for start in range(0, q.size(2), QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, q.size(2))
        bias = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu_(start + 1)
        parts.append((q[:, :, start:end] @ k[..., :end]).add_(bias).softmax(-1) @ v[:, :, :end])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
