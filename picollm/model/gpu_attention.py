"""Attention kernels that only GPUs have: variable length (FA2, FA3) and flex. Importing this loads torch's compiler.

Letters as in `picollm.model.attention`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# 2.11 added windows, 2.12 grouped queries.
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters if varlen_attn else ())
VARLEN_WORKS = {"scale", "window_size"} <= VARLEN_OPTIONS
VARLEN_GROUPS = "enable_gqa" in VARLEN_OPTIONS


def varlen(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T K D"],
    v: Float[Tensor, "B T K D"],
    scale: float,
    window: int | None,
    bounds: Int[Tensor, " N"] | None = None,
    *,
    fa3: bool = False,
) -> Float[Tensor, "B T H D"]:
    """Rows laid end to end, and where each starts: the only door of torch to flash attention with a window.

    Args:
        bounds: where each document starts, for attention inside them.
    """
    if fa3:
        use_fa3()
    B, T, H, D = q.shape
    options: dict[str, bool] = {}
    if k.size(2) != H:
        if VARLEN_GROUPS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(H // x.size(2), dim=2) for x in (k, v))
    starts = bounds
    if starts is None:
        starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)  # (B + 1,)
    q, k, v = (x.reshape(B * T, -1, D) for x in (q, k, v))
    # (left, right) of a query; -1 is without limit. A window of W sees W + 1 keys.
    sight = (-1 if window is None else window, 0)
    out = varlen_attn(q, k, v, starts, starts, T, T, scale=scale, window_size=sight, **options)
    return out.view(B, T, H, D)


@torch.compiler.assume_constant_result
def use_fa3() -> bool:
    """Put FA3 in the place of torch's own flash kernels, in this process; in compiled code, while it is compiled."""
    return _activate_fa3()


@functools.cache
def _activate_fa3() -> bool:
    attention.activate_flash_attention_impl("FA3")
    return True


# -- flex -------------------------------------------------------------------------------------------------------------

# (T, window, device) -> which blocks of 128 by 128 hold a pair that may be seen. A compiled caller reads it as a
# global, so that all layers of a kind share one mask and one graph.
_MASKS: dict[tuple[int, int | None, torch.device], BlockMask] = {}


def flex(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T K D"],
    v: Float[Tensor, "B T K D"],
    scale: float,
    window: int | None,
) -> Float[Tensor, "B T H D"]:
    """Flex attention (Dong et al. 2024, arXiv:2412.05496): one kernel generated for the mask, which skips blocks."""
    length, groups = q.size(1), q.size(2) != k.size(2)
    _make_mask(length, window, q.device)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = _MASKS[length, window, q.device]
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=groups).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@torch.compiler.assume_constant_result
def _make_mask(length: int, window: int | None, device: torch.device) -> bool:
    """See that the mask is there; while a caller is being compiled this runs then, and leaves nothing in its code."""
    reach = length if window is None else window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= reach)

    if (length, window, device) not in _MASKS:
        with torch.inference_mode(False):
            _MASKS[length, window, device] = create_block_mask(sees, None, None, length, length, device=device)
    return True
