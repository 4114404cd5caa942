"""Head and loss against autograd in float64, in both forms of a chunk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from picollm.model import loss as loss_module
from picollm.model.loss import linear_cross_entropy, rows_per_chunk

Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
CHUNKS = (loss_module._chunk, loss_module._plain_chunk)


@pytest.fixture(params=CHUNKS, ids=["eager", "plain"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chunk:
    """Either form does the work; the plain one as it is, not compiled."""
    monkeypatch.setattr(loss_module, "_chunk", request.param)
    return request.param


@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (2.0, 0.0), (None, 0.03), (2.0, 0.03)])
@pytest.mark.parametrize(("elements", "vocab_size"), [(1 << 21, 40), (100, 64)])
@pytest.mark.usefixtures("chunk")
def test_agrees_with_autograd(
    monkeypatch: pytest.MonkeyPatch, elements: int, vocab_size: int, softcap: float | None, z_loss: float
) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", elements)
    torch.manual_seed(0)
    x = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab_size, (70,))
    targets[::7] = -1
    ours = linear_cross_entropy(x, weight, targets, 0.125, vocab_size, softcap=softcap, z_loss=z_loss)
    gradients = torch.autograd.grad(3 * ours, (x, weight))
    z = x @ weight[:vocab_size].T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    penalty = z.logsumexp(-1)[targets >= 0].square().sum()
    reference = (F.cross_entropy(z, targets, ignore_index=-1, reduction="sum") + z_loss * penalty) * 0.125
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients, torch.autograd.grad(3 * reference, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.usefixtures("chunk")
def test_lower_types_round_once(dtype: torch.dtype, softcap: float | None) -> None:
    """Against float64 on the same rounded logits, gradients are off by one rounding."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(40, 300)).to(dtype)
    target = torch.randint(0, 300, (40,))
    scale = torch.tensor(8.0)  # as a loss scale: without one, float16 would lose small probabilities
    loss, dlogits = loss_module._chunk(logits, target, scale, softcap, 0.0, True)
    exact, dexact = loss_module._plain_chunk(logits.double(), target, scale, softcap, 0.0, True)
    assert loss.dtype == torch.float32
    assert dlogits is not None and dlogits.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dlogits.double(), dexact, rtol=max(eps, 1e-4), atol=torch.finfo(dtype).tiny)


@pytest.mark.usefixtures("chunk")
def test_survives_extreme_logits() -> None:
    x = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1]), 1.0, 2)
    assert loss.item() == pytest.approx(400.0)
    assert torch.autograd.grad(loss, x)[0].item() == pytest.approx(2.0)


@pytest.mark.usefixtures("chunk")
def test_a_row_without_targets_costs_nothing() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(16, 8), torch.full((4,), -1), 1.0, 16, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()


def test_a_tensor_may_be_the_scale() -> None:
    """A loss scale lives on the device; a number per step would be compiled into the graph."""
    x, weight, targets = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8), torch.tensor([1, 2, -1, 3])
    for scale in (0.5, torch.tensor(0.5)):
        loss = linear_cross_entropy(x, weight, targets, scale, 16)
        expected = 0.5 * F.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="sum")
        torch.testing.assert_close(loss, expected)


def test_without_gradients_none_is_made() -> None:
    x, weight, targets = torch.randn(4, 8), torch.randn(16, 8), torch.tensor([1, 2, -1, 3])
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, 1.0, 16)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.T, targets, ignore_index=-1, reduction="sum"))


def test_chunks_are_even_and_as_few_as_fit() -> None:
    assert rows_per_chunk(4096, 8192, 2, None) == 512
    assert rows_per_chunk(10, 8192, 2, None) == 10
    assert rows_per_chunk(0, 8192, 2, None) == 0
    gib = 1 << 30
    assert rows_per_chunk(32 * 2048, 32768, 2, 80 * gib) == 32768  # 2 GiB of logits at a time on an H100
    assert rows_per_chunk(32 * 2048, 32768, 2, 140 * gib) == 65536  # all 4 GiB on an H200
    for rows in (1, 77, 4097):
        step = rows_per_chunk(rows, 50_000, 2, 4 * gib)
        assert step * -(-rows // step) - rows < -(-rows // step)
