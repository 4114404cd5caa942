"""AdamW's mathematics against torch's, and which parameter belongs to which group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from picollm.optim.adamw import ADAM_GROUPS, EPS, AdamGroup, adamw_update, group_name


def numbers(group: AdamGroup, lr: float, count: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([*group.hyper(lr, count), 0, 0, 0], dtype=dtype)


@pytest.mark.parametrize("name", list(ADAM_GROUPS))
def test_it_is_torch_optim_adamw(name: str) -> None:
    group = ADAM_GROUPS[name]
    generator = torch.Generator().manual_seed(0)
    oracle = nn.Parameter(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    weight = oracle.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    adam = torch.optim.AdamW([oracle], betas=(group.beta1, group.beta2), weight_decay=group.weight_decay, eps=EPS)
    for step in range(8):
        adam.param_groups[0]["lr"] = lr = 0.01 * (step + 1)
        oracle.grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        adam.step()
        weight -= adamw_update(oracle.grad, weight, m, v, numbers(group, lr, step + 1, torch.float64), None)
    torch.testing.assert_close(weight, oracle.detach(), rtol=1e-12, atol=1e-14)


def test_a_zero_gradient_only_decays() -> None:
    group = ADAM_GROUPS["lm_head"]
    weight, zeros = torch.randn(4, 3), torch.zeros(4, 3)
    update = adamw_update(zeros, weight, zeros.clone(), zeros.clone(), numbers(group, 0.1, 1, torch.float32), None)
    torch.testing.assert_close(update, weight * 0.1 * group.weight_decay)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_that_is_not_kept_leaves_every_bit(poison: float) -> None:
    """As on a GPU, where `keep` is not known to the host."""
    weight, m, v = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)
    m[0, 0] = -0.0
    before = m.clone(), v.clone()
    grad = torch.randn(4, 3)
    grad[1, 1] = poison
    row = numbers(ADAM_GROUPS["lm_head"], 0.1, 3, torch.float32)
    assert torch.equal(adamw_update(grad, weight, m, v, row, torch.tensor(False)), torch.zeros(4, 3))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, (m, v), strict=True))
    kept = adamw_update(torch.ones(4, 3), weight, m, v, row, torch.tensor(True))
    assert torch.equal(kept, adamw_update(torch.ones(4, 3), weight, *(t.clone() for t in before), row, None))


def test_groups_go_by_the_first_part_of_the_name() -> None:
    assert group_name("value_embeds.3") == "value_embeds"
    assert group_name("lm_head") == "lm_head"
    assert group_name("layers.0.attention.value_gate.weight") is None
