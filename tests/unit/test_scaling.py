"""Shapes, parameters and FLOPs: the table of FACTS 2.1 for `full`, and its twin for `portable`."""

from __future__ import annotations

import pytest

from picollm.config.resolve import resolve
from picollm.model.gpt import GPT
from picollm.rates import batch_lr_factor, pretrain_horizon, reference_tokens, weight_decay, width_lr_factor
from picollm.scaling import architecture, causal_flops_per_token, flops_per_token, num_params


def config(*sets: str):
    return resolve(preset=None, sets=sets, environ={"XDG_CONFIG_HOME": "/nonexistent"}).config


# depth, width, heads, P and total of `full` in M, MFLOP a token of `full`, batch, rate factor and decay (ratio 8) of
# nanochat, AdamW factor, steps at ratio 8 and 12: FACTS 2.1, where heads below L = 8 are of 64 instead of 128 here.
FACTS_2_1 = [
    (4, 256, 4, 11.5, 36.7, 80, 262144, 0.707, 1.890, 1.732, 352, 528),
    (6, 384, 6, 23.2, 73.5, 168, 262144, 0.707, 0.940, 1.414, 708, 1062),
    (8, 512, 4, 41.9, 125.8, 296, 262144, 0.707, 0.520, 1.225, 1280, 1920),
    (12, 768, 6, 110.1, 286.3, 760, 524288, 1.0, 0.280, 1.0, 1680, 2520),
    (16, 1024, 8, 234.9, 536.9, 1590, 524288, 1.0, 0.131, 0.866, 3584, 5376),
    (20, 1280, 10, 435.2, 896.5, 2890, 1048576, 1.414, 0.100, 0.775, 3320, 4980),
    (24, 1536, 12, 729.8, 1384, 4780, 1048576, 1.414, 0.060, 0.707, 5568, 8352),
    (26, 1664, 13, 918.4, 1682, 5990, 1048576, 1.414, 0.048, 0.679, 7007, 10510),
    (32, 2048, 16, 1677.7, 2819, 10800, 2097152, 2.0, 0.037, 0.612, 6400, 9600),
]


@pytest.mark.parametrize("row", FACTS_2_1, ids=lambda row: f"d{row[0]}")
@pytest.mark.parametrize("name", ["full", "portable"])
def test_horizon_batch_and_rates_from_depth(row, name):
    depth, width, heads, scaling_m, _, _, batch, factor, decay, adam, *steps = row
    for ratio, expected in zip((8, 12), steps, strict=True):
        cfg = config(f"model.depth={depth}", f"train.ratio={ratio}", f"model.arch={name}")
        arch = architecture(cfg)
        horizon = pretrain_horizon(cfg, arch)
        assert (arch.hidden_size, arch.num_attention_heads) == (width, heads)
        assert arch.intermediate_size == 4 * width and arch.num_hidden_layers == depth
        assert num_params(arch).scaling / 1e6 == pytest.approx(scaling_m, abs=0.05)
        assert (horizon.batch_tokens, horizon.steps) == (batch, expected)
        assert batch_lr_factor(batch) == pytest.approx(max(0.8, factor), abs=1e-3)
        assert width_lr_factor(width) == pytest.approx(adam, abs=1e-3)
        # nanochat's rate has no floor, so compare the formula at nanochat's rate
        ours = weight_decay(expected, 0.02 * factor, ratio)
        theirs = 0.28 * factor * reference_tokens(ratio, 32768) / (ratio * scaling_m * 1e6)
        assert ours == pytest.approx(theirs, rel=0.01)
        assert ours == pytest.approx(decay, rel=0.01, abs=0.0006)


@pytest.mark.parametrize("row", FACTS_2_1, ids=lambda row: f"d{row[0]}")
def test_full_parameters_and_flops(row):
    depth, width, _, _, total_m, mflops, *_ = row
    arch = architecture(config(f"model.depth={depth}", "model.arch=full"))
    params = num_params(arch)
    assert arch.sliding_window == 512 and arch.windows[-1] is None and arch.windows[0] == 512
    # FACTS counts tables and matrices; gates and scalars are what is more
    assert (params.total - params.gates - params.scalars) / 1e6 == pytest.approx(total_m, rel=1e-3)
    assert params.value_embeddings == -(-depth // 2) * 32768 * width
    assert (params.gates, params.scalars) == (-(-depth // 2) * arch.num_key_value_heads * 12 + 24, 2 * depth + 2)
    assert flops_per_token(arch) / 1e6 == pytest.approx(mflops, rel=5e-3)


# depth, parameters, MFLOP a token: 6 P + 12 L C T; d12, d20 and d24 are GPU.md's
PORTABLE = [
    (4, 19_922_948, 94.4),
    (6, 35_782_662, 195.8),
    (8, 58_720_264, 352.3),
    (12, 135_266_316, 887),
    (16, 268_435_472, 1811.9),
    (20, 477_102_100, 3240),
    (24, 780_140_568, 5285),
    (26, 972_947_482, 6573.7),
    (32, 1_744_830_496, 11676.9),
]


@pytest.mark.parametrize(("depth", "total", "mflops"), PORTABLE)
def test_portable_parameters_and_flops(depth, total, mflops):
    arch = architecture(config(f"model.depth={depth}"))
    params = num_params(arch)
    assert params.total == total and arch.sliding_window is None
    assert (params.value_embeddings, params.gates, params.scalars) == (0, 0, depth)
    assert params.embedding == params.head == 32768 * arch.hidden_size
    assert flops_per_token(arch) / 1e6 == pytest.approx(mflops, abs=0.6)


@pytest.mark.parametrize(("depth", "causal"), [(12, 774), (20, 2926), (22, 3798), (24, 4832)])
def test_causal_flops_are_those_of_the_roofline(depth, causal):
    assert causal_flops_per_token(architecture(config(f"model.depth={depth}"))) / 1e6 == pytest.approx(causal, abs=0.6)


@pytest.mark.parametrize("pattern", ["L", "S", "SSSL", "LS"])
def test_causal_flops_count_the_pairs_that_see_each_other(pattern):
    sets = ["model.depth=3", "model.max_position_embeddings=300", f"model.window_pattern={pattern}"]
    arch = architecture(config(*sets, "tokenizer.vocab_size=320"))
    pairs = 0
    for window in arch.windows:
        reach = 300 if window is None else window
        pairs += sum(1 for i in range(300) for j in range(i + 1) if i - j <= reach)
    per_pair = 12 * arch.num_attention_heads * arch.head_dim
    expected = 6 * num_params(arch).scaling + per_pair * pairs / 300
    assert causal_flops_per_token(arch) == pytest.approx(expected)


def test_a_window_as_long_as_the_row_is_none():
    short = architecture(config("model.arch=full", "model.max_position_embeddings=128"))
    assert short.sliding_window is None and set(short.windows) == {None}
    assert architecture(config("model.arch=full", "model.max_position_embeddings=256")).sliding_window == 128


@pytest.mark.parametrize("sets", [[], ["model.arch=full"], ["model.smear=true", "model.x0_scalars=true"]])
def test_parameters_are_those_of_the_model(sets):
    cfg = config(
        "model.hidden_size=64", "model.num_hidden_layers=3", "model.head_dim=16", "model.num_key_value_heads=2",
        "model.intermediate_size=96", "tokenizer.vocab_size=300", *sets,
    )  # fmt: skip
    arch = architecture(cfg)
    assert arch.padded_vocab_size == 320
    found = dict.fromkeys(("embedding", "head", "matrices", "value_embeddings", "gates", "scalars"), 0)
    for name, parameter in GPT(arch).named_parameters():
        words = {
            "embed_tokens": "embedding", "lm_head": "head", "value_embeds": "value_embeddings", "smear_gate": "gates",
            "layers": "gates" if "value_gate" in name else "matrices",
        }  # fmt: skip
        found[words.get(name.split(".")[0], "scalars")] += parameter.numel()
    params = num_params(arch)
    assert found == {name: getattr(params, name) for name in found}
    assert params.total == sum(found.values())
