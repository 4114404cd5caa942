"""`full`: each feature against formulas written out token by token, alone and together, and through the cache."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from picollm.config.model import Architecture
from picollm.generate.engine import Engine
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.model.kv_cache import KVCache
from picollm.tokenizer.tokenizer import Tokenizer

FEATURES: dict[str, dict[str, object]] = {
    "windows": {"sliding_window": 3, "window_pattern": "SSSL"},
    "softcap": {"final_logit_softcapping": 2.0},
    "value_embeddings": {"value_embeddings": True},
    "x0_scalars": {"x0_scalars": True},
    "smear": {"smear": True},
    "backout": {"backout": True},
}
FULL = {key: value for feature in FEATURES.values() for key, value in feature.items()}


def architecture(**changes: object) -> Architecture:
    values: dict[str, object] = {
        "arch": "portable",  # a name only: features are read from the fields
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 50,
        "max_position_embeddings": 24,
        "rope_theta": 10_000.0,
    }
    return Architecture.model_validate(values | changes)


def random_model(arch: Architecture, dtype: torch.dtype = torch.float64) -> GPT:
    """Weights with nothing at zero, so that every path counts."""
    model = GPT(arch, compute_dtype=dtype).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty(p.shape, dtype=dtype).normal_(0, 0.3, generator=generator))
    return model


def random_ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def norm(v: torch.Tensor) -> torch.Tensor:
    return v / (v.square().mean() + 1e-6).sqrt()


def rotated(v: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """The half-split rotation as a product of complex numbers."""
    half = v.numel() // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def oracle(model: GPT, ids: list[int]) -> torch.Tensor:
    """Logits of one row by FACTS 2.2, one token and one head at a time."""
    a, w = model.arch, dict(model.named_parameters())
    L, D, groups = a.num_hidden_layers, a.head_dim, a.num_attention_heads // a.num_key_value_heads
    embedded = [norm(w["embed_tokens"][i]) for i in ids]
    stream = list(embedded)
    if a.smear:
        for t in range(1, len(ids)):
            gate = torch.sigmoid(w["smear_gate"] @ embedded[t][:24])
            stream[t] = embedded[t] + w["smear_lambda"][0] * gate * embedded[t - 1]
    first = list(stream)
    for layer in range(L):
        at = f"layers.{layer}."
        stream = [w["resid_theta"][layer].exp() * x for x in stream]
        if a.x0_scalars:
            stream = [x + w["x0_lambdas"][layer] * x0 for x, x0 in zip(stream, first, strict=True)]
        normed = [norm(x) for x in stream]
        keys, values = [], []
        for t, x in enumerate(normed):
            k = (w[at + "attention.k_proj.weight"] @ x).view(-1, D)
            keys.append([norm(rotated(head, t, a.rope_theta)) * a.qk_scale for head in k])
            v = (w[at + "attention.v_proj.weight"] @ x).view(-1, D)
            if a.value_embeddings and layer % 2 == (L - 1) % 2:
                gate = 3 * torch.sigmoid(w[at + "attention.value_gate.weight"] @ x[:12])
                v = v + gate[:, None] * w[f"value_embeds.{layer}"][ids[t]].view(-1, D)
            values.append(v)
        short = a.sliding_window is not None and a.window_pattern[layer % len(a.window_pattern)] == "S"
        behind = a.sliding_window if short and layer < L - 1 else len(ids)
        for t, x in enumerate(normed):
            q = (w[at + "attention.q_proj.weight"] @ x).view(-1, D)
            seen = [j for j in range(t + 1) if t - j <= behind]
            heads = []
            for h, head in enumerate(q):
                head = norm(rotated(head, t, a.rope_theta)) * a.qk_scale
                p = torch.stack([head @ keys[j][h // groups] for j in seen]).div(math.sqrt(D)).softmax(0)
                heads.append(sum(p[n] * values[j][h // groups] for n, j in enumerate(seen)))
            stream[t] = stream[t] + w[at + "attention.o_proj.weight"] @ torch.cat(heads)
        for t, x in enumerate(stream):
            up = (w[at + "mlp.up_proj.weight"] @ norm(x)).clamp_min(0) ** 2
            stream[t] = x + w[at + "mlp.down_proj.weight"] @ up
        if layer == L // 2:
            middle = list(stream)
    if a.backout:
        stream = [x - w["backout_lambda"][0] * m for x, m in zip(stream, middle, strict=True)]
    z = torch.stack([w["lm_head"][: a.vocab_size] @ norm(x) for x in stream])
    cap = a.final_logit_softcapping
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize(
    ("features", "backend"), [*((name, "sdpa") for name in (*FEATURES, "full")), ("full", "matmul")]
)
def test_logits_loss_and_gradients_are_those_of_the_written_out_formulas(features: str, backend: str) -> None:
    model = random_model(architecture(**(FULL if features == "full" else FEATURES[features])))
    model.backend = model.window_backend = backend
    ids = random_ids(1, 12)
    expected = oracle(model, ids[0].tolist())
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-9, atol=1e-9)
    targets = ids.roll(-1, 1)
    targets[0, -1] = -1
    nats = torch.nn.functional.cross_entropy(expected[:-1], targets[0, :-1], reduction="none")
    torch.testing.assert_close(model.nats(ids, targets)[0, :-1], nats.detach())
    penalty = 0.01 * expected[:-1].logsumexp(-1).square().sum()
    grads = torch.autograd.grad(0.5 * (nats.sum() + penalty), list(model.parameters()))
    loss = model.loss(ids, targets, scale=0.5, z_loss=0.01)
    torch.testing.assert_close(loss, 0.5 * (nats.sum() + penalty).detach(), check_dtype=False)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, grads, strict=True):
        assert b.any(), f"{name} takes no part"
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("features", [{}, FULL])
def test_cached_decoding_equals_the_whole_pass(features: dict[str, object]) -> None:
    """Uneven rows, right padding, then one token at a time, in rows of a cache that others have used."""
    model = random_model(architecture(**features))
    ids = random_ids(3, 20)
    lengths = torch.tensor([1, 6, 11])
    whole = model(ids)
    cache = KVCache(model.arch, batch=5, capacity=24, dtype=torch.float64)
    everything = torch.arange(24).expand(5, -1)
    model(random_ids(5, 24, seed=9), cache=cache, positions=everything)  # what earlier requests left behind
    slots, batch = torch.tensor([4, 0, 2]), torch.arange(3)
    padded = torch.where(torch.arange(11) < lengths[:, None], ids[:, :11], 7)
    first = model(padded, cache=cache, positions=everything[:3, :11], rows=slots, last=lengths - 1)
    torch.testing.assert_close(first[:, 0], whole[batch, lengths - 1])
    for step in range(9):
        at = lengths + step
        logits = model(ids[batch, at][:, None], cache=cache, positions=at[:, None], rows=slots)
        torch.testing.assert_close(logits[:, 0], whole[batch, at])


def test_views_and_moves_of_the_cache_keep_the_token_before() -> None:
    model = random_model(architecture(**FULL))
    ids = random_ids(2, 9)
    whole = model(ids)
    cache = KVCache(model.arch, batch=4, capacity=24, dtype=torch.float64)
    positions = torch.arange(8).expand(2, -1)
    model(ids[:, :8], cache=cache.view(2, 4), positions=positions)
    cache.move(3, 0, 8)
    logits = model(ids[1:, 8:], cache=cache.view(0, 1), positions=torch.tensor([[8]]))
    torch.testing.assert_close(logits[0, 0], whole[1, 8])


def test_the_engine_decodes_as_the_whole_pass_does(tokenizer: Tokenizer) -> None:
    """Seven requests through three slots: prefills of uneven prompts, slots that move, slots that are used again."""
    model = random_model(architecture(vocab_size=tokenizer.vocab_size, **FULL), torch.float32)
    model.eval().requires_grad_(False)
    model.lm_head[min(tokenizer.special.values()) :] = 0  # no calculator that puts words in the model's mouth
    rng = random.Random(0)
    prompts = [[tokenizer.bos, *(rng.randrange(256) for _ in range(rng.randint(0, 9)))] for _ in range(7)]
    limits = [3, 8, 5, 12, 2, 9, 6]
    engine = Engine(model, tokenizer, num_slots=3)
    replies = engine.generate(prompts, [Sampling(max_new_tokens=limit) for limit in limits])
    for prompt, reply in zip(prompts, replies, strict=True):
        logits = model(torch.tensor([prompt + reply.ids[:-1]]))[0, len(prompt) - 1 :]
        chosen = logits.gather(-1, torch.tensor(reply.ids)[:, None])[:, 0]
        assert len(reply.ids) == limits.pop(0)
        torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=1e-4)


def test_one_token_rows_and_single_layers_work() -> None:
    model = random_model(architecture(num_hidden_layers=1, **FULL))
    ids = random_ids(2, 1)
    torch.testing.assert_close(model(ids)[1], oracle(model, ids[1].tolist()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden_size", [16, 48])
def test_every_parameter_is_initialised(monkeypatch: pytest.MonkeyPatch, hidden_size: int) -> None:
    """Memory full of NaN, as a fresh process may find it: nothing of it survives, and no name is unknown."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def poisoned(*size: int, **options: object) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    model = GPT(architecture(hidden_size=hidden_size, **FULL))
    assert all(p.isnan().all() for p in model.parameters())
    model.init_weights(3)
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name


def test_names_and_shapes_of_full() -> None:
    names = {name: tuple(p.shape) for name, p in GPT(architecture(**FULL)).named_parameters()}
    extra = {name for name in names if name not in dict(GPT(architecture()).named_parameters())}
    tables = {f"value_embeds.{i}": (64, 16) for i in (0, 2, 4)}
    gates = {f"layers.{i}.attention.value_gate.weight": (2, 12) for i in (0, 2, 4)}
    scalars = {"x0_lambdas": (5,), "smear_gate": (24,), "smear_lambda": (1,), "backout_lambda": (1,)}
    assert {name: names[name] for name in extra} == tables | gates | scalars


def test_start_values() -> None:
    arch = architecture(hidden_size=256, num_hidden_layers=4, vocab_size=1000, **FULL)
    model = GPT(arch)
    model.init_weights(0)
    w = {name: p.detach() for name, p in model.named_parameters()}
    bound = math.sqrt(3 / 256)
    torch.testing.assert_close(w["resid_theta"].exp(), torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    torch.testing.assert_close(w["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert w["smear_lambda"].tolist() == [0.0]
    assert w["backout_lambda"].tolist() == pytest.approx([0.2])
    uniform = {
        "layers.0.attention.q_proj.weight": (-bound, bound),
        "layers.3.attention.v_proj.weight": (-bound, bound),
        "layers.1.mlp.up_proj.weight": (-0.4 * bound, 0.4 * bound),
        "value_embeds.3": (-bound, bound),
        "layers.1.attention.value_gate.weight": (0, 0.02),
        "smear_gate": (0, 0.02),
    }
    for name, (low, high) in uniform.items():
        values = w[name]
        assert low <= values.min() and values.max() <= high, name
        # Four standard errors of the mean of a uniform distribution.
        error = 4 * (high - low) / math.sqrt(12 * values.numel())
        assert abs(values.mean() - (low + high) / 2) < error, name
    for name in ("layers.2.attention.o_proj.weight", "layers.2.mlp.down_proj.weight"):
        assert not w[name].any()
    assert w["embed_tokens"].std() == pytest.approx(0.8, rel=0.02)
    assert w["lm_head"].std() == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize("features", [{}, FULL])
def test_recomputed_activations_give_the_same_gradients(features: dict[str, object]) -> None:
    model = random_model(architecture(**features), torch.float32)
    model.compute_dtype = torch.bfloat16
    ids = random_ids(2, 24)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model.loss(ids, ids.roll(-1, 1)), list(model.parameters())))

    kept = gradients()
    saved = {flag: saved_bytes(model, ids, flag) for flag in (False, True)}
    assert saved[True] < saved[False] / 3
    model.activation_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(), kept, strict=True))


def saved_bytes(model: GPT, ids: torch.Tensor, checkpointing: bool) -> int:
    """Bytes that the stream's graph keeps of activations."""
    model.activation_checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(ids)
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_types_follow_float64(dtype: torch.dtype) -> None:
    exact = random_model(architecture(**FULL))
    model = GPT(exact.arch, compute_dtype=dtype)
    model.load_state_dict(exact.state_dict())
    ids = random_ids(2, 24)
    expected = exact.loss(ids, ids.roll(-1, 1), scale=1 / 48)
    loss = model.loss(ids, ids.roll(-1, 1), scale=1 / 48)
    assert loss.dtype == torch.float32
    assert model(ids).dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=5 * torch.finfo(dtype).eps)


def test_windows_reach_as_far_as_they_say() -> None:
    """With one layer that is not the last, token 0 is out of sight of token `window` + 1 and in sight before."""
    arch = architecture(num_hidden_layers=2, sliding_window=4, window_pattern="S")
    model = random_model(arch)
    with torch.no_grad():
        model.layers[1].attention.o_proj.weight.zero_()
    ids = random_ids(1, 10)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 50
    changed = [bool(d) for d in (model(ids) != model(other)).any(-1)[0]]
    assert changed == [True] * 5 + [False] * 5
