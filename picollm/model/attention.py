"""The one door to attention; `picollm.attention_choice` says which backend a run takes.

Letters: B batch, T queries, S keys, H query heads, K key/value heads, D head size, N rows of a block of queries.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from picollm.attention_choice import AttentionChoice, AttentionDevice, Kernel, kernel_family, mismatch
from picollm.config.model import Architecture

# Queries are taken in blocks, each against the keys that one of them may see: the other scores are never computed.
# Scores in memory cost least in small blocks; a call of SDPA has more to set up.
MATMUL_BLOCK = 128
SDPA_BLOCK = 256
# Kernels in the order in which a backend may take them. cuDNN refuses some shapes; flash then takes its place.
SDPA_KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "fa3": [SDPBackend.FLASH_ATTENTION],
}


def causal_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S K D"],
    v: Float[Tensor, "B S K D"],
    *,
    scale: float,
    backend: str,
    window: int | None = None,
    positions: Int[Tensor, "B T"] | None = None,
    bounds: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """Attend each query to its own position and to those before it.

    Grouped queries (H a multiple of K) follow Ainslie et al. 2023, arXiv:2305.13245.

    Args:
        scale: factor on the scores before the softmax.
        backend: one of `picollm.attention_choice.BACKENDS`; `choose_attention` has made sure that it works here.
        window: keys visible behind a query, in tokens; None sees all of them.
        positions: index of each query among the S keys, for decoding from a cache; None means S = T, query i at i.
            The specialised kernels know no positions: all backends but `matmul` then are `sdpa`.
        bounds: where each document starts among the B T tokens laid end to end, then B T, int32; tokens see their own
            document only. Without positions; for the backends that `choose_attention` gives for documents.
    """
    assert bounds is None or backend not in ("cudnn", "flash", "flex"), "choose_attention refuses them"
    if window is not None and window >= k.size(1) - 1:
        window = None  # it hides nothing
    if positions is None and backend in ("varlen", "flex", "fa3"):
        from picollm.model import gpu_attention  # it loads torch's compiler, a second that CPUs need not spend

        if backend == "flex":
            return gpu_attention.flex(q, k, v, scale, window)
        if backend == "varlen" or window is not None or bounds is not None:
            return gpu_attention.varlen(q, k, v, scale, window, bounds, fa3=backend == "fa3")
        gpu_attention.use_fa3()
    groups = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, S, D)
    if positions is None and backend in SDPA_KERNELS:
        assert window is None, f"{backend} has no windows: choose_attention refuses them"
        with sdpa_kernel(SDPA_KERNELS[backend], set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
        return out.transpose(1, 2)
    # Off the CPU some of SDPA's kernels want equal heads, and torch would take the slow one without a word.
    if groups > 1 and (backend == "matmul" or q.device.type != "cpu"):
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    visible = None if positions is None else _visible(positions, k.size(2), window)
    if bounds is not None:
        visible = _visible(torch.arange(q.size(2), device=q.device)[None], k.size(2), window) & _alike(bounds, q)
    if backend == "matmul":
        return _matmul(q * scale, k, v, window, visible).transpose(1, 2)
    sdpa = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=groups > 1)
    if visible is not None:
        return sdpa(q, k, v, attn_mask=visible).transpose(1, 2)
    if window is None:
        return sdpa(q, k, v, is_causal=True).transpose(1, 2)
    band = _band(SDPA_BLOCK, window, None, q.device)
    parts = [
        sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=band[part])
        for rows, keys, part in _blocks(q.size(2), window, SDPA_BLOCK)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _matmul(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S D"],
    window: int | None,
    visible: Bool[Tensor, "B 1 T S"] | None,
) -> Float[Tensor, "B H T D"]:
    """softmax(q k^T) v with the scores in memory; `visible` None means query i at key i."""
    k = k.transpose(-1, -2)  # (B, H, D, S)
    if visible is not None:
        return ((q @ k).masked_fill(~visible, float("-inf"))).softmax(-1) @ v
    reach = k.size(3) if window is None else window
    band = _band(MATMUL_BLOCK, reach, q.dtype, q.device)
    parts = [
        (q[:, :, rows] @ k[..., keys]).add_(band[part]).softmax(-1) @ v[:, :, keys]
        for rows, keys, part in _blocks(q.size(2), reach, MATMUL_BLOCK)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# -- who sees whom ----------------------------------------------------------------------------------------------------


def _visible(positions: Int[Tensor, "B T"], num_keys: int, window: int | None) -> Bool[Tensor, "B 1 T S"]:
    behind = positions[:, None, :, None] - torch.arange(num_keys, device=positions.device)
    return behind >= 0 if window is None else (behind >= 0) & (behind <= window)


def _alike(bounds: Int[Tensor, " N"], q: Float[Tensor, "B H T D"]) -> Bool[Tensor, "B 1 T T"]:
    """Which tokens of a row are of one document."""
    B, _, T, _ = q.shape
    document = torch.bucketize(torch.arange(B * T, device=q.device), bounds, right=True).view(B, 1, T)
    return document[..., :, None] == document[..., None, :]


def _blocks(length: int, reach: int, size: int) -> Iterator[tuple[slice, slice, tuple[slice, slice]]]:
    """Blocks of queries: their rows, the keys that one of them sees, and the part of the band for this pair."""
    for start in range(0, length, size):
        end, first = min(start + size, length), max(0, start - reach)
        left = reach - (start - first)
        yield slice(start, end), slice(first, end), (slice(end - start), slice(left, left + end - first))


def _band(size: int, reach: int, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """What `size` queries see of the `reach` keys before the first of them and of their own: (N, reach + N).

    Args:
        dtype: of a bias, 0 for keys in sight and -inf for others; None for booleans.
    """
    # A compiler warns of caches and looks through them; there the band is a small part of the graph.
    return (_make_band if torch.compiler.is_compiling() else _kept_band)(size, reach, dtype, device)


def _make_band(size: int, reach: int, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    ahead = torch.arange(reach + size, device=device) - torch.arange(size, device=device)[:, None]
    band = (ahead >= 0) & (ahead <= reach)
    return band if dtype is None else torch.zeros_like(band, dtype=dtype).masked_fill_(~band, float("-inf"))


@functools.lru_cache(maxsize=16)
def _kept_band(size: int, reach: int, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # one made in an evaluation must serve a backward pass later
        return _make_band(size, reach, dtype, device)


# -- the device -------------------------------------------------------------------------------------------------------


@functools.cache
def attention_device(device: torch.device) -> AttentionDevice:
    """What `choose_attention` asks about a device, from torch itself."""
    if device.type != "cuda":
        return AttentionDevice(device.type)
    installed = {"flex"} if importlib.util.find_spec("triton") else set()
    if torch.version.hip:
        return AttentionDevice("cuda", rocm=True, installed=frozenset(installed))
    from picollm.model.gpu_attention import VARLEN_WORKS

    if torch.backends.cuda.is_flash_attention_available():
        installed |= {"flash", "varlen"} if VARLEN_WORKS else {"flash"}
        swappable = hasattr(attention, "activate_flash_attention_impl")  # torch 2.11 and later
        if VARLEN_WORKS and swappable and importlib.util.find_spec("flash_attn_interface"):
            installed.add("fa3")
    capability = torch.cuda.get_device_capability(device)
    return AttentionDevice("cuda", capability=capability, cudnn=cudnn_version(), installed=frozenset(installed))


def cudnn_version() -> int | None:
    """Of the cuDNN that was loaded, 91501 for 9.15.1; None where there is none."""
    for _ in range(2):  # where it is older than the one that torch was built with, the first question is an error
        with contextlib.suppress(RuntimeError):
            return torch.backends.cudnn.version()
    return None


# Which kernel runs does not depend on the number of rows, and a fallback may keep all scores in memory.
PROFILED_ROWS = 2


def kernel_that_ran(choice: AttentionChoice, arch: Architecture, dtype: torch.dtype, device: torch.device) -> str:
    """One call forward and backward with a run's shapes under the profiler, as a sentence for the run's notes.

    Flex is left out: it is the kernel that was compiled, and nothing takes its place in silence.

    Returns:
        the families and names of the kernels, and where one is not what was chosen, why that matters and the remedy;
        empty where there is nothing to be seen (a CPU, a machine without the profiler).
    """
    if device.type != "cuda":
        return ""
    layers = [("", choice.full, None)]
    if choice.window is not None:
        layers.append(("in windows ", choice.window, arch.sliding_window))
    shape = (PROFILED_ROWS, arch.max_position_embeddings, arch.num_attention_heads, arch.head_dim)
    seen, problems = [], [": ".join(choice.slow)] if choice.slow else []
    for where, backend, window in layers:
        if backend == "flex":
            continue
        if kernel := profiled_kernel(backend, shape, arch.num_key_value_heads, dtype, device, window):
            seen.append(f"{where}{kernel}")
            if problem := mismatch(backend, kernel):
                problems.append(": ".join(problem))
    return f"attention kernels that ran: {'; '.join([', '.join(seen), *problems])}" if seen else ""


def profiled_kernel(
    backend: str,
    shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> Kernel | None:
    """The attention kernel that a backend's call spends most time in, forward and backward.

    Args:
        shape: of the queries, (B, T, H, D).

    Returns:
        None off CUDA, or where the profiler sees no kernels.
    """
    B, T, _, D = shape
    # Zeros: random numbers would move the generator whose state a run resumes with.
    q = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    k, v = (torch.zeros(B, T, kv_heads, D, dtype=dtype, device=device, requires_grad=True) for _ in range(2))

    def call() -> None:
        out = causal_attention(q, k, v, scale=D**-0.5, backend=backend, window=window)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    call()  # what the first call loads and compiles is not to be measured
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize(device)
    except RuntimeError:  # the driver may keep its counters from us, and no run should end for that
        return None
    events = sorted(trace.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    kernels = [Kernel(kernel_family(event.key), event.key) for event in events if event.self_device_time_total > 0]
    return next((kernel for kernel in kernels if kernel.family != "math"), kernels[0] if kernels else None)
