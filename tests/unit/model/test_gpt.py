"""The model against an independent float64 computation, and its cache against itself."""

from __future__ import annotations

import pytest
import torch

from picollm.config.model import Architecture
from picollm.model.attention import causal_attention
from picollm.model.gpt import GPT
from picollm.model.kv_cache import KVCache


def architecture(**changes: object) -> Architecture:
    values = {
        "arch": "portable",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 50,
        "max_position_embeddings": 16,
        "rope_theta": 100_000.0,
    }
    return Architecture(**values | changes)


def trained_like(model: GPT) -> GPT:
    """Weights with nothing at zero, so that every path counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.1, generator=generator))
    return model


@pytest.fixture
def model() -> GPT:
    model = GPT(architecture(), compute_dtype=torch.float64).double()
    model.init_weights(0)
    return trained_like(model)


def reference_logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """MODEL.md written out token by token, with nothing shared with the code under test."""
    a = model.arch
    w = {name: p.detach() for name, p in model.named_parameters()}

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v / torch.sqrt((v * v).mean() + a.rms_norm_eps)

    def rotate(v: torch.Tensor, position: int) -> torch.Tensor:
        half = a.head_dim // 2
        out = torch.empty_like(v)
        for i in range(half):
            angle = torch.tensor(position * a.rope_theta ** (-2 * i / a.head_dim), dtype=torch.float64)
            out[i] = v[i] * angle.cos() - v[i + half] * angle.sin()
            out[i + half] = v[i + half] * angle.cos() + v[i] * angle.sin()
        return out

    stream = [norm(w["embed_tokens"][i]) for i in ids]
    for layer in range(a.num_hidden_layers):
        at = f"layers.{layer}."
        stream = [w["resid_theta"][layer].exp() * x for x in stream]
        normed = [norm(x) for x in stream]
        keys, values = [], []
        for position, x in enumerate(normed):
            k = (w[at + "attention.k_proj.weight"] @ x).view(-1, a.head_dim)
            keys.append([norm(rotate(head, position)) * a.qk_scale for head in k])
            values.append((w[at + "attention.v_proj.weight"] @ x).view(-1, a.head_dim))
        for position, x in enumerate(normed):
            q = (w[at + "attention.q_proj.weight"] @ x).view(-1, a.head_dim)
            heads = []
            for h, head in enumerate(q):
                head = norm(rotate(head, position)) * a.qk_scale
                group = h * a.num_key_value_heads // a.num_attention_heads
                scores = torch.stack([head @ keys[j][group] for j in range(position + 1)]) / a.head_dim**0.5
                p = scores.softmax(0)
                heads.append(sum(p[j] * values[j][group] for j in range(position + 1)))
            stream[position] = stream[position] + w[at + "attention.o_proj.weight"] @ torch.cat(heads)
        for position, x in enumerate(stream):
            up = (w[at + "mlp.up_proj.weight"] @ norm(x)).clamp_min(0) ** 2
            stream[position] = x + w[at + "mlp.down_proj.weight"] @ up
    return torch.stack([w["lm_head"][: a.vocab_size] @ norm(x) for x in stream])


def test_logits_are_those_of_the_written_out_formulas(model: GPT) -> None:
    ids = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(ids)[0], reference_logits(model, ids[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 4])
def test_attention_backends_agree(groups: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 4 // groups, 8, dtype=torch.float64)
    a, b = (causal_attention(q, k, v, scale=0.3, backend=backend) for backend in ("matmul", "sdpa"))
    torch.testing.assert_close(a, b)


def test_the_future_is_invisible(model: GPT) -> None:
    ids = torch.randint(0, 50, (2, 12))
    before = model(ids)
    ids[:, 7:] = (ids[:, 7:] + 1) % 50
    torch.testing.assert_close(model(ids)[:, :7], before[:, :7], rtol=0, atol=0)


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    model = GPT(architecture())
    model.init_weights(0)
    ids = torch.randint(0, 50, (4, 16))
    loss = model.loss(ids, ids.roll(-1, 1), scale=1 / ids.numel())
    assert loss.item() == pytest.approx(3.912, abs=0.01)  # ln 50


def test_weights_depend_on_seed_and_name_only() -> None:
    one, deeper, other = GPT(architecture()), GPT(architecture(num_hidden_layers=5)), GPT(architecture())
    one.init_weights(7), deeper.init_weights(7), other.init_weights(8)
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), deeper.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_nats_are_the_loss_position_by_position(model: GPT) -> None:
    ids = torch.randint(0, 50, (3, 16))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    nats = model.nats(ids, targets)
    assert not nats[:, -1].any()
    torch.testing.assert_close(nats.sum(), model.loss(ids, targets).detach())


def test_cached_decoding_equals_the_whole_pass(model: GPT) -> None:
    """Rows of different length in one batch: prefill padded on the right, then one token at a time."""
    ids = torch.randint(0, 50, (2, 14))
    lengths = torch.tensor([5, 9])
    whole = model(ids)
    cache = KVCache(model.arch, batch=2, capacity=16, dtype=torch.float64)
    positions = torch.arange(9).expand(2, 9)
    first = model(ids[:, :9], cache=cache, positions=positions, last=lengths - 1)
    torch.testing.assert_close(first[:, 0], whole[torch.arange(2), lengths - 1])
    for step in range(5):
        at = lengths + step
        token = ids[torch.arange(2), at][:, None]
        logits = model(token, cache=cache, positions=at[:, None])
        torch.testing.assert_close(logits[:, 0], whole[torch.arange(2), at])


def test_cache_rows_can_be_addressed_and_reused(model: GPT) -> None:
    ids = torch.randint(0, 50, (1, 6))
    cache = KVCache(model.arch, batch=3, capacity=16, dtype=torch.float64)
    cache.keys.normal_()  # what an earlier request left behind
    cache.values.normal_()
    logits = model(ids, cache=cache, positions=torch.arange(6)[None], rows=torch.tensor([2]))
    torch.testing.assert_close(logits, model(ids))


def test_an_architecture_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads"):
        architecture(num_key_value_heads=3)
