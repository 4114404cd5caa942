"""Each rule of the fold against the native model, and all of them together in a model written out here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from picollm.config.model import Architecture
from picollm.errors import ConfigError, IntegrityError
from picollm.export import folding
from picollm.export.folding import folded, folded_shapes, open_checkpoint, residual_scales, swiglu
from picollm.model.functional import apply_rotary, relu_squared, rms_norm, rotary_table
from picollm.model.gpt import GPT

from .conftest import MakeStage, randomise


def stock(weights: dict[str, Tensor], arch: Architecture, ids: Tensor) -> Tensor:
    """A stock decoder (Qwen3 with relu(x)^2) in plain operations: norms with weights, QK norm, then rotation."""
    eps, D, H, K = arch.rms_norm_eps, arch.head_dim, arch.num_attention_heads, arch.num_key_value_heads
    rotary = rotary_table(ids.size(1), D, arch.rope_theta, torch.float32, torch.device("cpu"))[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[name], eps)

    x = weights["token_embd"][ids]
    for i in range(arch.num_hidden_layers):
        w = {name.rpartition(".")[2]: w for name, w in weights.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, f"layers.{i}.attn_norm")
        q = apply_rotary(norm((y @ w["q"].T).unflatten(-1, (H, D)), f"layers.{i}.q_norm"), rotary).transpose(1, 2)
        k = apply_rotary(norm((y @ w["k"].T).unflatten(-1, (K, D)), f"layers.{i}.k_norm"), rotary).transpose(1, 2)
        v = (y @ w["v"].T).unflatten(-1, (K, D)).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=D**-0.5, enable_gqa=True)
        x = x + a.transpose(1, 2).flatten(2) @ w["o"].T
        x = x + F.relu(norm(x, f"layers.{i}.ffn_norm") @ w["up"].T).square() @ w["down"].T
    return norm(x, "output_norm") @ weights["output"].T


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_hidden_layers": 6}, {"hidden_size": 72, "intermediate_size": 200}, {"num_key_value_heads": 1}],
    ids=str,
)
def test_a_stock_decoder_with_the_folded_weights_gives_the_native_logits(
    small: Callable[..., Architecture], make_stage: MakeStage, changes: dict[str, int]
) -> None:
    model = randomise(GPT(small(**changes)))
    ids = torch.randint(0, model.arch.vocab_size, (2, 256), generator=torch.Generator().manual_seed(1))
    checkpoint = open_checkpoint(make_stage(model))
    native = model(ids)
    found = stock(dict(folded(checkpoint, checkpoint.arch)), model.arch, ids)
    assert native.std() > 0.5  # something to get wrong
    assert (found - native).abs().max() < 1e-4
    assert torch.equal(found.argmax(-1), native.argmax(-1))


def test_names_shapes_and_types_are_those_announced(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    model = randomise(GPT(small()))
    checkpoint = open_checkpoint(make_stage(model))
    found = list(folded(checkpoint.path, checkpoint.arch))
    assert {name: tuple(t.shape) for name, t in found} == folded_shapes(model.arch)
    assert [name for name, _ in found] == list(folded_shapes(model.arch))
    assert {tensor.dtype for _, tensor in found} == {torch.float32}


def test_padding_rows_are_left_out(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    model = randomise(GPT(small(vocab_size=500)))
    assert model.embed_tokens.size(0) == 512
    found = dict(folded(open_checkpoint(make_stage(model)), model.arch))
    assert found["token_embd"].size(0) == found["output"].size(0) == 500
    assert torch.equal(found["output"], model.lm_head[:500])


def test_embedding_is_normed_once_and_the_checkpoint_stays_as_it_was(
    small: Callable[..., Architecture], make_stage: MakeStage
) -> None:
    model = randomise(GPT(small()))
    checkpoint = open_checkpoint(make_stage(model))
    for _ in range(2):
        found = dict(folded(checkpoint, model.arch))
        assert torch.equal(found["token_embd"], rms_norm(model.embed_tokens[: model.arch.vocab_size], 1e-6))
    assert open_checkpoint(checkpoint.stage).sha256 == checkpoint.sha256


def test_scalars_go_into_what_a_layer_adds(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    model = randomise(GPT(small()))
    found = dict(folded(open_checkpoint(make_stage(model)), model.arch))
    first, second = model.resid_theta.double().exp().tolist()
    for layer, scale in enumerate((first, first * second)):
        for name, weight in (("o", model.layers[layer].attention.o_proj), ("down", model.layers[layer].mlp.down_proj)):
            torch.testing.assert_close(found[f"layers.{layer}.{name}"] * scale, weight.weight, rtol=1e-6, atol=0)
        assert torch.equal(found[f"layers.{layer}.up"], model.layers[layer].mlp.up_proj.weight)


def test_norm_before_rotation_is_norm_after_it() -> None:
    x = torch.randn(1, 50, 3, 16, generator=torch.Generator().manual_seed(0))
    rotary = rotary_table(50, 16, 1e5, torch.float32, torch.device("cpu"))[:, None]
    after = 1.2 * rms_norm(apply_rotary(x, rotary), 1e-6)
    torch.testing.assert_close(apply_rotary(1.2 * rms_norm(x, 1e-6), rotary), after, rtol=1e-5, atol=1e-6)


def test_scalars_too_near_to_zero_are_refused() -> None:
    assert residual_scales(torch.zeros(3)) == [1.0, 1.0, 1.0]
    assert residual_scales(torch.tensor([math.log(0.5), math.log(0.2)])) == pytest.approx([0.5, 0.1])
    with pytest.raises(ConfigError, match="does not fold") as refused:
        residual_scales(torch.tensor([0.0, math.log(0.2), math.log(0.2)]))
    assert "layer 2 is 0.04" in (refused.value.cause or "")
    with pytest.raises(ConfigError):
        residual_scales(torch.tensor([float("nan")]))


def test_swiglu_comes_as_near_as_promised() -> None:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    for c in (folding.SWIGLU_C, folding.SWIGLU_C_QUANTISED):
        gate, up, down = swiglu(x[:, None], torch.ones(1, 1, dtype=torch.float64), c)
        found = F.silu(gate) * up * down
        error = (found[:, 0] - relu_squared(x)).abs().max()
        assert 0 < error <= 0.483 / c**2


def test_swiglu_keeps_the_bits_of_weights() -> None:
    up = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate, small, down = swiglu(up, up)
    assert torch.equal(gate.float(), up.float() * 1024) and torch.equal(small.float(), up.float() / 32)
    assert torch.equal(down, small)


def test_swiglu_of_float16_bears_large_activations() -> None:
    """In float16 throughout, as GPUs without bfloat16 compute; a gate of 1024 alone would overflow at 8."""
    x = torch.linspace(-60, 60, 4001).half()
    one = torch.ones(1, 1)
    gate, up, down = (part.half() for part in swiglu(one, one, folding.SWIGLU_C_FLOAT16))
    x = x[:, None]
    found = (F.silu(x * gate) * (x * up)).float() * down.float()
    torch.testing.assert_close(found, relu_squared(x.float()), rtol=3e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_xielu_is_relu_squared(dtype: torch.dtype) -> None:
    """By the formula of arXiv:2411.13010, with its scalars in the type of the weights."""
    x = torch.linspace(-8, 8, 4001).to(dtype)

    def xielu(x: Tensor, alpha_p: float) -> Tensor:
        p, n = (F.softplus(torch.tensor(a, dtype=dtype)) for a in (alpha_p, folding.XIELU_ALPHA_N))
        eps = torch.tensor(folding.XIELU_EPS, dtype=dtype)
        return torch.where(x > 0, p * x * x, (torch.expm1(torch.minimum(x, eps)) - x) * n)

    scaled = xielu(x / folding.XIELU_UP_DIVISOR, folding.XIELU_ALPHA_P_SCALED)
    assert torch.equal(scaled, relu_squared(x))
    if dtype == torch.float32:
        torch.testing.assert_close(xielu(x, folding.XIELU_ALPHA_P), relu_squared(x), rtol=2e-7, atol=0)


def test_features_that_do_not_fold_are_named(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    model = randomise(GPT(small("full")))
    with pytest.raises(ConfigError) as refused:
        next(folded(open_checkpoint(make_stage(model)), model.arch))
    for feature in ("windows", "soft-capped", "value embeddings", "smear", "backout"):
        assert feature in (refused.value.cause or "")


def test_a_damaged_checkpoint_is_refused(small: Callable[..., Architecture], make_stage: MakeStage) -> None:
    stage = make_stage(randomise(GPT(small())))
    weights = open_checkpoint(stage).path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged"):
        open_checkpoint(stage)
