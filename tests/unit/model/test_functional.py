"""The written-out formulas against autograd and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from picollm.model import functional
from picollm.model.functional import apply_rotary, linear_cross_entropy, relu_squared, rotary_table


@pytest.mark.parametrize("vocab_size", [40, 64])
@pytest.mark.parametrize("chunk", [1 << 21, 100])
def test_linear_cross_entropy_agrees_with_autograd(
    monkeypatch: pytest.MonkeyPatch, chunk: int, vocab_size: int
) -> None:
    monkeypatch.setattr(functional, "LOGITS_PER_CHUNK", chunk)
    torch.manual_seed(0)
    x = torch.randn(70, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab_size, (70,))
    targets[::7] = -1
    ours = linear_cross_entropy(x, weight, targets, 0.125, vocab_size)
    (3 * ours).backward()
    dx, dw = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    logits = x @ weight[:vocab_size].T
    reference = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") * 0.125
    (3 * reference).backward()
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(dw, weight.grad)


def test_linear_cross_entropy_survives_extreme_logits() -> None:
    x = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1]), 1.0, 2)
    assert loss.item() == pytest.approx(400.0)


def test_a_row_without_targets_costs_nothing() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(16, 8), torch.full((4,), -1), 1.0, 16)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()


def test_relu_squared_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, (x,))
    torch.testing.assert_close(relu_squared(x), torch.where(x > 0, x * x, 0.0))


def test_rotation_keeps_norms_and_depends_on_distance_only() -> None:
    table = rotary_table(32, 8, 100_000.0, torch.float64, torch.device("cpu"))[:, None]
    q = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 32, 1, 8)
    k = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 32, 1, 8)
    rq, rk = apply_rotary(q, table), apply_rotary(k, table)
    torch.testing.assert_close(rq.norm(dim=-1), q.norm(dim=-1))
    scores = (rq[0, :, 0] @ rk[0, :, 0].T).numpy()
    for distance in (0, 3, 9):
        diagonal = scores.diagonal(-distance)
        assert diagonal.max() - diagonal.min() < 1e-12


def test_rotation_is_the_standard_direction() -> None:
    """Position p turns the pair (1, 0) to (cos p, sin p): the +theta half-split rotation of stock runtimes."""
    table = rotary_table(4, 2, 10_000.0, torch.float64, torch.device("cpu"))[:, None]
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 4, 1, 2)
    turned = apply_rotary(x, table)[0, :, 0]
    p = torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(turned, torch.stack([p.cos(), p.sin()], -1))
