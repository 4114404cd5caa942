"""Muon's mathematics, step by step, and without its extras against torch.optim.Muon."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from picollm.optim.muon import average, equalize, muon_update, neuron_axis, neuron_factors, or_zero, orthogonalize

SHAPES = [(1, 24, 24), (2, 16, 64), (2, 64, 16), (3, 2, 12)]
TORCH_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hyper(mu: float, rate: float, decay: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([mu, rate, decay, 0, 0, 0, 0, 0], dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_pulls_singular_values_to_one(shape: tuple[int, ...]) -> None:
    x = random(shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    result = orthogonalize(x / (1.01 * s.norm(dim=-1)[:, None, None]))
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.3
    # The singular vectors stay, so that the result is close to the polar factor in direction too.
    overlap = (result * (u @ vh)).sum((-2, -1)) / (result.norm(dim=(-2, -1)) * (u @ vh).norm(dim=(-2, -1)))
    assert overlap.min() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_equalized_and_neurons_evened_out(shape: tuple[int, ...]) -> None:
    rows, columns = shape[-2:]
    x = random(shape) * torch.logspace(-6, 2, rows, dtype=torch.float64)[:, None]
    norms = equalize(x).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, rows**-0.5 / 1.01), rtol=1e-6, atol=0)
    axis = neuron_axis(rows, columns)
    second = torch.zeros_like(x.sum(axis, keepdim=True))
    even = x * neuron_factors(x, second, None)
    goal = min(rows, columns) ** 0.5
    torch.testing.assert_close(even.norm(dim=(-2, -1)), torch.full(shape[:1], goal, dtype=torch.float64))
    per_neuron = even.norm(dim=axis)  # from a fresh average every neuron comes out alike, but for the floor of 1e-10
    usual = per_neuron.median()
    assert per_neuron.max() < 1.01 * usual


def test_without_its_extras_it_is_torch_optim_muon() -> None:
    """Momentum, Nesterov, iteration, rate by shape and decay composed by hand; torch's coefficients and bfloat16."""
    for shape in ((24, 24), (16, 64), (64, 16)):
        parameter = nn.Parameter(random(shape, 1, torch.float32))
        ours, momentum = parameter.detach().clone(), torch.zeros(1, *shape)
        oracle = torch.optim.Muon([parameter], lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
        for step in range(10):
            grad = random(shape, 2 + step, torch.float32)
            parameter.grad = grad.clone()
            oracle.step()
            ahead = torch.lerp(grad, average(momentum, grad[None], 0.1, None)[0], 0.9).bfloat16()
            direction = orthogonalize((ahead / ahead.norm())[None], (TORCH_COEFFICIENTS,) * 5)[0]
            ours -= 0.05 * 0.1 * ours + 0.05 * max(1, shape[0] / shape[1]) ** 0.5 * direction.float()
        # bfloat16 has 8 bits, ten steps of length about 0.05 differ by at most a few roundings.
        torch.testing.assert_close(ours, parameter.detach(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_gradient_is_a_zero_update(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also for one zero matrix among others, and for zero rows or columns in a matrix."""
    weight = random(shape, 1, torch.float32)
    state = (torch.zeros(shape), torch.zeros_like(weight.sum(neuron_axis(*shape[-2:]), keepdim=True)))
    numbers = hyper(0.9, 0.02, 0.3, torch.float32)
    for keep in (None, torch.tensor(True)):
        assert muon_update(torch.zeros(shape), weight, *state, numbers, keep, dtype).abs().max() == 0
        assert all(s.abs().max() == 0 for s in state)
    grad = torch.cat([torch.zeros(shape), random(shape, 2, torch.float32)])
    grad[-1, 0] = 0
    grad[-1, :, 1] = 0
    weight, state = torch.cat([weight, weight]), tuple(torch.cat([s, s]) for s in state)
    for _ in range(3):
        update = muon_update(grad, weight, *state, numbers, None, dtype)
        assert torch.isfinite(update).all()
        assert update[: shape[0]].abs().max() == 0 and update[shape[0] :].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_size_of_a_gradient_does_not_matter(dtype: torch.dtype, size: float) -> None:
    """float16 ends at 65 504 and at 6e-8, so gradients must not enter it as they come."""
    shape = (2, 64, 32)
    grad, weight = random(shape, 0, torch.float32), torch.zeros(shape)

    def update(grad: Tensor, dtype: torch.dtype) -> Tensor:
        state = torch.zeros(shape), torch.zeros(2, 64, 1)
        return muon_update(grad, weight, *state, hyper(0.9, 1.0, 0.0, torch.float32), None, dtype)

    expected = update(grad, torch.float32)
    error = (update(grad * size, dtype) - expected).norm() / expected.norm()
    assert error < (0.01 if dtype == torch.float32 else 0.05)  # the 1e-6 under the norm shows at 1e-4


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_kept_leaves_every_bit(poison: float) -> None:
    """As on a GPU, where `keep` is not known to the host."""
    shape = (2, 8, 16)
    weight, momentum, second = (random(s, i, torch.float32) for i, s in enumerate((shape, shape, (2, 1, 16))))
    momentum[0, 0, 0] = -0.0
    before = [t.clone() for t in (momentum, second)]
    grad = random(shape, 5, torch.float32)
    grad[1, 2, 3] = poison
    numbers = hyper(0.9, 0.02, 0.3, torch.float32)
    update = muon_update(grad, weight, momentum, second, numbers, torch.tensor(False), torch.float32)
    assert torch.equal(weight.view(torch.int32), (weight - update).view(torch.int32))
    for old, new in zip(before, (momentum, second), strict=True):
        assert torch.equal(old.view(torch.int32), new.view(torch.int32))


def test_keeping_by_a_tensor_is_keeping() -> None:
    shape = (2, 8, 16)
    grad, weight = random(shape, 0), random(shape, 1)
    results = []
    for keep in (None, torch.tensor(True)):
        state = [torch.zeros(shape, dtype=torch.float64), torch.zeros(2, 1, 16, dtype=torch.float64)]
        update = muon_update(grad, weight, *state, hyper(0.9, 0.02, 0.3), keep, torch.float64)
        results.append([update, *state])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(or_zero(grad, torch.tensor(False)), torch.zeros_like(grad))
