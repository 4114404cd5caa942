"""Every backend that runs here against attention written out query by query, in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from picollm.attention_choice import AttentionDevice, choose_attention
from picollm.config.model import Architecture, short_window
from picollm.model.attention import attention_device, causal_attention, kernel_that_ran, profiled_kernel

SCALE = 0.3
# T (also no multiple of a block of queries, and shorter than one), window.
SHAPES = [(300, None), (300, 100), (300, 0), (390, 256), (256, 128), (40, 7), (40, 39), (40, 500), (1, 3)]


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None, positions: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v for one query of one row at a time, over the keys that it may see and no others."""
    B, T, H, _ = q.shape
    k, v = (torch.stack([x[:, :, h * x.size(2) // H] for h in range(H)], dim=2) for x in (k, v))
    rows = []
    for b in range(B):
        for t in range(T):
            last = t if positions is None else int(positions[b, t])
            first = 0 if window is None else max(0, last - window)
            scores = (k[b, first : last + 1] * q[b, t]).sum(-1) * SCALE  # (keys, H)
            rows.append((torch.softmax(scores, 0)[..., None] * v[b, first : last + 1]).sum(0))
    return torch.stack(rows).view(q.shape)


def tensors(*sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Leaves of two rows with heads of 16, by (length, heads)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, heads, size) for length, heads, size in sizes]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def qkv(T: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return tensors((T, 4, 16), (T, kv_heads, 16), (T, kv_heads, 16), dtype=dtype)


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = attend(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def same(ours: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.detach().abs().max()) + 1e-14)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("T", "window"), SHAPES)
def test_forward_and_gradients(T: int, window: int | None, kv_heads: int) -> None:
    inputs = qkv(T, kv_heads)
    exact = with_gradients(lambda q, k, v: reference(q, k, v, window), inputs)
    for backend in ("matmul", "sdpa"):
        attend = lambda q, k, v, b=backend: causal_attention(q, k, v, scale=SCALE, backend=b, window=window)  # noqa: E731
        same(with_gradients(attend, inputs), exact, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
def test_in_the_types_of_training(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = qkv(140, dtype=dtype)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(lambda q, k, v: reference(q, k, v, 50), doubles)
    attend = lambda q, k, v: causal_attention(q, k, v, scale=SCALE, backend=backend, window=50)  # noqa: E731
    same(with_gradients(attend, inputs), exact, tolerance)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["matmul", "sdpa", "cudnn", "flash", "varlen", "fa3", "flex"])
def test_decoding_from_a_cache_by_positions(backend: str, window: int | None) -> None:
    q, k, v = tensors((3, 4, 16), (40, 2, 16), (40, 2, 16))
    positions = torch.tensor([[5, 6, 7], [37, 38, 39]])
    ours = causal_attention(q, k, v, scale=SCALE, backend=backend, window=window, positions=positions)
    same([ours], [reference(q, k, v, window, positions)], 1e-12)


def test_a_mask_made_in_an_evaluation_serves_training() -> None:
    inputs = qkv(300)
    with torch.inference_mode():
        causal_attention(*inputs, scale=SCALE, backend="sdpa", window=33)
        causal_attention(*inputs, scale=SCALE, backend="matmul", window=33)
    for backend in ("sdpa", "matmul"):
        causal_attention(*inputs, scale=SCALE, backend=backend, window=33).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


# -- compiled ---------------------------------------------------------------------------------------------------------


def test_a_block_around_it_compiles_to_one_graph_per_kind_of_layer() -> None:
    script = Path(__file__).with_name("attention_compiles.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# -- variable length --------------------------------------------------------------------------------------------------


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """Torch's own `varlen_attn`, down to the call that has no CPU kernel: that call is answered here."""
    gpu_attention = pytest.importorskip("picollm.model.gpu_attention")
    if not gpu_attention.VARLEN_WORKS:
        pytest.skip("`varlen_attn` with windows came with torch 2.11")

    def weights(q, k, starts, scale, left):
        """Softmax over what the flash kernel documents: (tokens, H, tokens); and the keys with their heads repeated."""
        k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
        token = torch.arange(len(q))
        row = torch.bucketize(token, starts[1:].long(), right=True)
        behind = token[:, None] - token
        visible = (row[:, None] == row) & (behind >= 0) & (behind <= (len(q) if left in (None, -1) else left))
        scores = torch.einsum("thd,shd->ths", q, k) * scale
        return scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), k

    def forward(q, k, v, starts, _, max_q, max_k, *args, scale=None, window_size_left=None, **options):
        assert max_q == max_k and starts.dtype == torch.int32
        p, _ = weights(q, k, starts, scale, window_size_left)
        out = torch.einsum("ths,shd->thd", p, v.repeat_interleave(q.size(1) // v.size(1), dim=1))
        return out, q.new_zeros(q.size(1), len(q)), q.new_zeros(2), q.new_zeros(0), q.new_zeros(0)

    def backward(g, q, k, v, out, lse, starts, *args, scale=None, window_size_left=None, **options):
        p, keys = weights(q, k, starts, scale, window_size_left)
        dp = torch.einsum("thd,shd->ths", g, v.repeat_interleave(q.size(1) // v.size(1), dim=1))
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        dk, dv = torch.einsum("ths,thd->shd", ds, q), torch.einsum("ths,thd->shd", p, g)
        dk, dv = (x.unflatten(1, (k.size(1), -1)).sum(2) for x in (dk, dv))
        return torch.einsum("ths,shd->thd", ds, keys), dk, dv

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("groups_known", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_rows_of_variable_length(
    window: int | None, groups_known: bool, flash_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end to end must not see each other; torch 2.11 has no grouped queries there, 2.12 has."""
    from picollm.model import gpu_attention

    monkeypatch.setattr(gpu_attention, "VARLEN_GROUPS", groups_known and gpu_attention.VARLEN_GROUPS)
    inputs = qkv(40)
    exact = with_gradients(lambda q, k, v: reference(q, k, v, window), inputs)
    attend = lambda q, k, v: causal_attention(q, k, v, scale=SCALE, backend="varlen", window=window)  # noqa: E731
    same(with_gradients(attend, inputs), exact, 1e-12)


# -- the device -------------------------------------------------------------------------------------------------------


def test_on_a_cpu_there_is_a_choice_and_no_kernel_to_be_profiled() -> None:
    cpu = torch.device("cpu")
    assert attention_device(cpu) == AttentionDevice("cpu")
    arch = Architecture(
        arch="full", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, vocab_size=64, max_position_embeddings=1024, rope_theta=10_000.0,
        sliding_window=short_window(1024), window_pattern="SSSL",
    )  # fmt: skip
    choice = choose_attention(attention_device(cpu), "float32", 1024, windows=True)
    assert kernel_that_ran(choice, arch, torch.float32, cpu) == ""
    assert profiled_kernel("sdpa", (1, 8, 2, 16), 1, torch.float32, cpu) is None
