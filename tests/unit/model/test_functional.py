"""The written-out formulas against autograd and float64."""

from __future__ import annotations

import torch

from picollm.model.functional import apply_rotary, relu_squared, rms_norm, rotary_table


def test_relu_squared_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, (x,))
    torch.testing.assert_close(relu_squared(x), torch.where(x > 0, x * x, 0.0))


def test_rms_norm_gradient() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, 1e-12), (x,))
    torch.testing.assert_close(rms_norm(x, 1e-6), torch.nn.functional.rms_norm(x, (7,), eps=1e-6))
    assert not rms_norm(torch.zeros(2, 7), 1e-6).any()


def test_rotation_gradient() -> None:
    table = rotary_table(5, 6, 100.0, torch.float64, torch.device("cpu"))[:, None]
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table), (x,))


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
