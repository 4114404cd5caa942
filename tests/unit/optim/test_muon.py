"""The optimizer against a plain float64 transcription of its definition."""

from __future__ import annotations

import math

import torch
from torch import nn

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.model.gpt import GPT
from picollm.optim import schedules
from picollm.optim.muon import ADAM_GROUPS, POLAR_EXPRESS, MuonAdamW, orthogonalize

ARCH = Architecture(
    arch="portable", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    intermediate_size=64, vocab_size=40, max_position_embeddings=8, rope_theta=1e5,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.3)
SCHEDULE = Schedule(
    warmup_steps=2, warmdown_steps=6, final_lr_fraction=0.05, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip
STEPS = 10


def make(dtype: torch.dtype = torch.float64) -> tuple[GPT, MuonAdamW]:
    model = GPT(ARCH, compute_dtype=dtype).to(dtype)
    model.init_weights(0)
    return model, MuonAdamW(model, RATES, SCHEDULE, STEPS, dtype=dtype)


def give_gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    grads = {}
    for name, p in model.named_parameters():
        grads[name] = torch.empty(p.shape, dtype=p.dtype).normal_(generator=generator)
        p.grad = grads[name].clone()
    return grads


def naive_muon(w, g, buf, second, step):
    """One matrix, one step, every formula in its plainest form. Returns (weight, momentum, second moment)."""
    rows, columns = w.shape
    mu = schedules.momentum(step, STEPS, SCHEDULE)
    buf = mu * buf + (1 - mu) * g
    u = (1 - mu) * g + mu * buf
    u = torch.stack([row / row.norm() * (u.norm() / math.sqrt(rows)) for row in u])
    x = u / (1.01 * u.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        if rows > columns:
            gram = x.T @ x
            x = a * x + x @ (b * gram + c * gram @ gram)
        else:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * math.sqrt(min(rows, columns)) / x.norm()
    axis = 1 if rows >= columns else 0
    second = 0.9 * second + 0.1 * (x**2).mean(axis, keepdim=True)
    y = x / second.clamp_min(1e-10).sqrt()
    y = y * x.norm() / y.norm()
    decay = RATES.weight_decay * schedules.decay_factor(step, STEPS)
    rate = RATES.matrix_lr * schedules.lr_factor(step, STEPS, SCHEDULE) * max(1, rows / columns) ** 0.5
    return w - rate * (y + decay * w * ((y * w) >= 0)), buf, second


def test_matrices_follow_the_definition() -> None:
    model, optimizer = make()
    names = [name for name, _ in model.named_parameters() if name not in ADAM_GROUPS]
    state = {}
    for name in names:
        w = model.get_parameter(name).detach().clone()
        rows, columns = w.shape
        state[name] = (w, torch.zeros_like(w), w.new_zeros((rows, 1) if rows >= columns else (1, columns)))
    for step in range(STEPS):
        grads = give_gradients(model, step)
        optimizer.step(step)
        for name in names:
            w, buf, second = state[name]
            state[name] = naive_muon(w, grads[name], buf, second, step)
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).detach(), state[name][0], rtol=1e-9, atol=1e-11)


def test_the_rest_is_adamw() -> None:
    """torch.optim.AdamW with the same groups and the schedule's rates is the oracle."""
    model, optimizer = make()
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters() if n in ADAM_GROUPS}
    groups = [
        {"params": [copies[n]], "betas": (g.beta1, g.beta2), "weight_decay": g.weight_decay, "name": n}
        for n, g in ADAM_GROUPS.items()
    ]
    oracle = torch.optim.AdamW(groups, eps=1e-10)
    rate_of = {"embed_tokens": "embedding", "lm_head": "unembedding", "resid_theta": "scalar"}
    for step in range(STEPS):
        grads = give_gradients(model, step)
        for group in oracle.param_groups:
            group["lr"] = optimizer.rates_at(step)[rate_of[group["name"]]]
            copies[group["name"]].grad = grads[group["name"]]
        oracle.step()
        optimizer.step(step)
    for name, expected in copies.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def test_orthogonalize_pulls_singular_values_to_one() -> None:
    torch.manual_seed(0)
    for shape in ((1, 24, 24), (2, 16, 64), (2, 64, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64)))
        assert values.min() > 0.7 and values.max() < 1.3


def test_an_all_zero_gradient_moves_nothing() -> None:
    model, optimizer = make(torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n not in ADAM_GROUPS}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.rates = RATES.model_copy(update={"weight_decay": 0.0})
    optimizer.step(0)
    for name, expected in before.items():
        assert torch.equal(model.get_parameter(name), expected)


def test_state_survives_a_round_trip_by_name() -> None:
    model, optimizer = make()
    for step in range(3):
        give_gradients(model, step)
        optimizer.step(step)
    saved = {name: t.clone() for name, t in optimizer.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin, twin_optimizer = make()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(weights[name])
    twin_optimizer.load_state_dict(saved)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        give_gradients(m, 3)
        o.step(3)
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name)), name


def test_training_reduces_the_loss() -> None:
    model, optimizer = make(torch.float32)
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(STEPS):
        loss = model.loss(ids[:, :-1], ids[:, 1:], scale=1 / 32)
        loss.backward()
        optimizer.step(step)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
