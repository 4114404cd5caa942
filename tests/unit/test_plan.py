"""Derived numbers: FACTS 2.1 where it does not depend on `full`, its twin for `portable`, and what fails."""

from __future__ import annotations

import json
import math
import re

import pytest

from picollm import estimate, plan, recipes, scaling
from picollm.attention_choice import AttentionDevice
from picollm.config.presets import PRESETS
from picollm.config.recipe import Source
from picollm.config.resolve import resolve
from picollm.config.schema import RunConfig
from picollm.errors import ConfigError
from picollm.hardware import Gpu, Machine

GIB = 2**30
LAPTOP = Machine("Linux", "cpu", frozenset({"avx2"}), 4, 8, 16 * GIB, 8 * GIB, ())
AMX = Machine("Linux", "cpu", frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}), 2, 2, 23 * GIB, 20 * GIB, ())
H200 = Machine(
    "Linux", "cpu", frozenset({"avx2"}), 16, 16, 128 * GIB, 120 * GIB,
    (Gpu(0, "NVIDIA H200", 140 * GIB, (9, 0), "570.1"),),
)  # fmt: skip
DATA = (Source(dataset="toy-world", sha256="d" * 64),)


@pytest.fixture(autouse=True)
def no_omp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def config(*sets: str, preset: str | None = None) -> RunConfig:
    return resolve(preset=preset, sets=sets, environ={"XDG_CONFIG_HOME": "/nonexistent"}).config


def recipe(cfg: RunConfig, machine: Machine = LAPTOP):
    return plan.pretrain_recipe(
        cfg, machine, tokenizer_vocab=cfg.tokenizer.vocab_size, tokenizer_sha256="t" * 64, data=DATA
    )


# depth, width, heads, P in M, batch, rate factor, decay at ratio 8 by nanochat, AdamW factor, steps at 8 and 12
FACTS_2_1 = [
    (4, 256, 4, 11.5, 262144, 0.707, 1.890, 1.732, 352, 528),
    (6, 384, 6, 23.2, 262144, 0.707, 0.940, 1.414, 708, 1062),
    (8, 512, 4, 41.9, 262144, 0.707, 0.520, 1.225, 1280, 1920),
    (12, 768, 6, 110.1, 524288, 1.0, 0.280, 1.0, 1680, 2520),
    (16, 1024, 8, 234.9, 524288, 1.0, 0.131, 0.866, 3584, 5376),
    (20, 1280, 10, 435.2, 1048576, 1.414, 0.100, 0.775, 3320, 4980),
    (24, 1536, 12, 729.8, 1048576, 1.414, 0.060, 0.707, 5568, 8352),
    (26, 1664, 13, 918.4, 1048576, 1.414, 0.048, 0.679, 7007, 10510),
    (32, 2048, 16, 1677.7, 2097152, 2.0, 0.037, 0.612, 6400, 9600),
]


@pytest.mark.parametrize("row", FACTS_2_1, ids=lambda row: f"d{row[0]}")
def test_numbers_from_depth(row):
    depth, width, heads, scaling_m, batch, factor, decay, adam, *steps = row
    for ratio, expected in zip((8, 12), steps, strict=True):
        cfg = config(f"model.depth={depth}", f"train.ratio={ratio}")
        arch = plan.architecture(cfg)
        horizon = scaling.pretrain_horizon(cfg, arch)
        assert (arch.hidden_size, arch.num_attention_heads) == (width, heads)
        assert arch.intermediate_size == 4 * width and arch.num_hidden_layers == depth
        assert plan.num_params(arch).scaling / 1e6 == pytest.approx(scaling_m, abs=0.05)
        assert (horizon.batch_tokens, horizon.steps) == (batch, expected)
        assert scaling.batch_lr_factor(batch) == pytest.approx(max(0.8, factor), abs=1e-3)
        assert scaling.width_lr_factor(width) == pytest.approx(adam, abs=1e-3)
        # nanochat's rate has no floor, so compare the formula at nanochat's rate
        ours = scaling.weight_decay(expected, 0.02 * factor, ratio)
        assert ours == pytest.approx(
            0.28 * factor * scaling.reference_tokens(ratio, 32768) / (ratio * scaling_m * 1e6), rel=0.01
        )
        assert ours == pytest.approx(decay, rel=0.01, abs=0.0006)


# depth, parameters, MFLOP a token, the same causal (GPU.md 1.1)
@pytest.mark.parametrize(
    ("depth", "total", "mflops", "causal"),
    [
        (12, 135_266_316, 887, 774),
        (20, 477_102_100, 3240, 2926),
        (22, 615_645_206, 4178, 3798),
        (24, 780_140_568, 5285, 4832),
    ],
)
def test_portable_totals(depth, total, mflops, causal):
    arch = plan.architecture(config(f"model.depth={depth}"))
    params = plan.num_params(arch)
    assert params.total == total
    assert params.scalars == depth and params.embedding == params.head == 32768 * arch.hidden_size
    assert plan.flops_per_token(arch) / 1e6 == pytest.approx(mflops, abs=0.6)
    assert plan.causal_flops_per_token(arch) / 1e6 == pytest.approx(causal, abs=0.6)


def test_params_match_the_model():
    from picollm.model.gpt import GPT

    cfg = config(
        "model.hidden_size=64", "model.num_hidden_layers=3", "model.head_dim=16", "model.num_key_value_heads=2",
        "model.intermediate_size=96", "tokenizer.vocab_size=300",
    )  # fmt: skip
    arch = plan.architecture(cfg)
    assert plan.num_params(arch).total == sum(p.numel() for p in GPT(arch).parameters())
    assert arch.padded_vocab_size == 320


def test_logits_chunk_is_the_models():
    from picollm.model import functional

    assert estimate.LOGITS_PER_CHUNK == functional.LOGITS_PER_CHUNK


@pytest.mark.parametrize("steps", [1, 20, 120, 360, 2520, 50_000])
def test_automatic_batch_for_steps_agrees_with_the_rule_for_tokens(steps):
    reference = scaling.reference_tokens(12, 32768)
    batch = scaling.auto_batch_tokens_for_steps(steps, reference)
    assert batch == scaling.auto_batch_tokens(steps * batch, reference)


def test_automatic_batch_is_a_multiple_of_odd_rows():
    cfg = config("model.max_position_embeddings=1000", "train.steps=50")
    assert scaling.pretrain_horizon(cfg, plan.architecture(cfg)).batch_tokens % 1000 == 0


def test_demo_rates():
    rates = recipe(config(preset="demo")).rates
    assert rates.matrix_lr == pytest.approx(0.02)
    assert rates.embedding_lr == pytest.approx(0.05, rel=0.01)
    assert rates.unembedding_lr == pytest.approx(0.004, rel=0.01)
    # the whole run decays by as much as a long one: rate x decay x steps is the timescale
    assert rates.matrix_lr * rates.weight_decay * 140 == pytest.approx(1 / 0.0709, rel=1e-4)
    assert recipe(config("train.weight_decay=false", preset="demo")).rates.weight_decay == 0


def test_adam_rates_follow_width_and_all_follow_batch():
    small = recipe(config("train.batch_tokens=524288", "model.depth=12")).rates
    large = recipe(config("train.batch_tokens=2097152", "model.depth=12")).rates
    wide = recipe(config("train.batch_tokens=524288", "model.depth=48")).rates
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr"):
        assert getattr(large, name) == pytest.approx(2 * getattr(small, name))
    assert wide.embedding_lr == pytest.approx(small.embedding_lr / 2)
    assert wide.unembedding_lr == pytest.approx(small.unembedding_lr / 2)
    assert (wide.matrix_lr, wide.scalar_lr) == (small.matrix_lr, small.scalar_lr)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 49, 120, 360, 2520, 100_000])
def test_schedules_fit_their_run(steps):
    for schedule in (scaling.pretrain_schedule(steps), scaling.sft_schedule(steps)):
        assert schedule.warmup_steps + schedule.warmdown_steps <= steps
        assert schedule.momentum_ramp_steps + schedule.warmdown_steps <= steps
        assert schedule.momentum_ramp_steps <= max(0.2 * steps, 0)
    pretrain = scaling.pretrain_schedule(steps)
    assert 1 <= pretrain.warmup_steps <= 40
    assert pretrain.warmup_steps <= math.ceil(0.02 * steps)
    assert scaling.sft_schedule(steps).warmup_steps <= 0.02 * steps


def test_schedule_of_a_long_run():
    schedule = scaling.pretrain_schedule(10_000)
    assert (schedule.warmup_steps, schedule.warmdown_steps, schedule.momentum_ramp_steps) == (40, 6500, 400)
    assert (schedule.momentum_start, schedule.momentum_peak, schedule.momentum_end) == (0.85, 0.97, 0.90)
    assert schedule.final_lr_fraction == 0.05


# -- recipes and runtimes ---------------------------------------------------------------------------------------------


def test_sft_recipe_follows_pretraining():
    cfg = config(preset="demo")
    pretrain = recipe(cfg, AMX)
    sft = plan.sft_recipe(cfg, LAPTOP, pretrain, data=DATA, init_from="w" * 64)
    assert (sft.stage, sft.steps, sft.batch_tokens, sft.init_from) == ("sft", 560, 2048, "w" * 64)
    assert sft.dtype == pretrain.dtype == "bfloat16"  # also on a machine that would choose another
    assert sft.rates.matrix_lr == pytest.approx(0.6 * pretrain.rates.matrix_lr)
    assert sft.rates.weight_decay == 0
    assert sft.schedule.warmdown_steps == 280 and sft.schedule.final_lr_fraction == 0
    assert sft.model == pretrain.model and sft.tokenizer_sha256 == pretrain.tokenizer_sha256
    type(sft).model_validate_json(sft.model_dump_json())


def test_sft_without_steps_is_one_pass():
    cfg = config("sft.steps=none", preset="demo")
    sft = plan.sft_recipe(cfg, LAPTOP, recipe(cfg), data=DATA, init_from="w", num_tokens=2048 * 10 + 1)
    assert sft.steps == 11
    with pytest.raises(ConfigError, match="length of fine-tuning"):
        plan.sft_recipe(cfg, LAPTOP, recipe(cfg), data=DATA, init_from="w")


def test_recipe_does_not_depend_on_how_it_is_run():
    plain = recipe(config(preset="demo"))
    other = recipe(config("train.threads=3", "train.device_batch_size=4", "model.attention=sdpa", preset="demo"))
    assert plain == other


def test_forced_dtype_gives_the_same_recipe_everywhere():
    cfg = config("train.dtype=float32", preset="demo")
    assert recipe(cfg, LAPTOP) == recipe(cfg, AMX)
    assert recipe(cfg).dtype_reason == "`train.dtype` asks for it"


@pytest.mark.parametrize(
    ("device", "dtype", "row", "requested", "name"),
    [
        ("cpu", "bfloat16", 256, "auto", "matmul"),
        ("cpu", "bfloat16", 513, "auto", "sdpa"),
        ("cpu", "float32", 128, "auto", "matmul"),
        ("cuda", "bfloat16", 128, "auto", "sdpa"),
        ("cpu", "float32", 2048, "matmul", "matmul"),
    ],
)
def test_attention(device, dtype, row, requested, name):
    chosen = plan.choose_attention(AttentionDevice(device), dtype, row, requested=requested)
    assert chosen.full == name and chosen.window is None and chosen.reason


def test_runtime_on_cpu():
    cfg = config(preset="demo")
    runtime = plan.train_runtime(cfg, AMX, recipe(cfg, AMX))
    assert (runtime.threads, runtime.device_batch_size, runtime.attention) == (2, 16, "auto")
    assert not runtime.compile and runtime.checkpoint_every == 10 and runtime.eval_every is None
    asked = config("train.threads=1", "train.compile=true", "train.device_batch_size=4", "train.checkpoint_every=7",
                   "train.eval_every=50", preset="demo")  # fmt: skip
    runtime = plan.train_runtime(asked, AMX, recipe(asked, AMX))
    assert (runtime.threads, runtime.compile, runtime.device_batch_size) == (1, True, 4)
    assert (runtime.checkpoint_every, runtime.eval_every) == (7, 50)


@pytest.mark.parametrize(("steps", "every"), [(1, 10), (120, 10), (480, 24), (5000, 250), (100_000, 1000)])
def test_checkpoint_cadence(steps, every):
    assert recipes.checkpoint_cadence(steps) == every


def test_device_batch_shrinks_with_memory_and_divides_the_rows():
    cfg = config(preset="d12")
    sizes = []
    for gib in (8, 24, 80, 140):
        machine = Machine("Linux", "", frozenset(), 8, 8, 64 * GIB, 64 * GIB,
                          (Gpu(0, "H100", gib * GIB, (9, 0), ""),))  # fmt: skip
        runtime = plan.train_runtime(cfg, machine, recipe(cfg, machine))
        assert runtime.compile and runtime.eval_every == 250
        assert 256 % runtime.device_batch_size == 0
        sizes.append(runtime.device_batch_size)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    tiny = Machine("Linux", "", frozenset(), 1, 1, GIB // 4, GIB // 4, ())
    assert plan.train_runtime(cfg, tiny, recipe(cfg, tiny)).device_batch_size == 1


def test_ranks_share_rows_and_threads():
    cfg = config(preset="cpu-small")
    runtime = plan.train_runtime(cfg, LAPTOP, recipe(cfg), ranks=2)
    assert (runtime.ranks, runtime.device_batch_size, runtime.threads) == (2, 4, 2)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "names"),
    [
        (["model.hidden_size=200"], ["`model.hidden_size` (200)", "`model.head_dim` (64)", "model.hidden_size=192"]),
        (["model.hidden_size=200", "model.num_attention_heads=3"], ["(200)", "`model.num_attention_heads` (3)", "=2`"]),
        (
            ["model.num_key_value_heads=4"],
            ["`model.num_attention_heads` (6)", "`model.num_key_value_heads` (4)", "=3`"],
        ),
        (["model.hidden_size=99", "model.head_dim=33"], ["`model.head_dim` (33)", "model.head_dim=34"]),
    ],
)
def test_shapes_that_do_not_divide(sets, names):
    with pytest.raises(ConfigError) as caught:
        plan.architecture(config(*sets))
    text = f"{caught.value.message} {caught.value.cause} {caught.value.hint}"
    assert all(name in text for name in names), text


def test_following_the_hints_of_shape_errors_ends_in_a_shape():
    sets = ["model.hidden_size=99", "model.head_dim=33"]
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            plan.architecture(config(*sets))
        sets.append(re.search(r"--set (\S+)`", caught.value.hint)[1])
    assert sets[2:] == ["model.head_dim=34", "model.hidden_size=102"]
    assert plan.architecture(config(*sets)).num_attention_heads == 3


def test_batch_that_is_not_whole_rows():
    with pytest.raises(ConfigError) as caught:
        recipe(config("train.batch_tokens=1000", preset="cpu-small"))
    assert "`train.batch_tokens` (1000) is not a multiple of 512" in caught.value.message
    assert "512 or 1024" in caught.value.hint
    cfg = config("sft.batch_tokens=100", preset="cpu-small")
    with pytest.raises(ConfigError, match=r"`sft.batch_tokens` \(100\)"):
        plan.sft_recipe(cfg, LAPTOP, recipe(cfg), data=DATA, init_from="w")


def test_batch_that_does_not_split_over_ranks_or_device_batches():
    cfg = config(preset="cpu-small")
    with pytest.raises(ConfigError) as caught:
        plan.train_runtime(cfg, LAPTOP, recipe(cfg), ranks=3)
    assert "(4096) is not a multiple of 1536" in caught.value.message
    assert "3072 or 4608" in caught.value.hint
    cfg = config("train.device_batch_size=3", preset="cpu-small")
    with pytest.raises(ConfigError, match="not a multiple of 1536") as caught:
        plan.train_runtime(cfg, LAPTOP, recipe(cfg))
    assert "train.device_batch_size" in caught.value.cause


# -- the whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_has_a_plan(preset):
    for machine in (LAPTOP, AMX, H200):
        found = plan.make_plan(config(preset=preset), machine)
        shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert shown["memory_gib"] > 0 and shown["time_s"] > 0 and shown["disk_gib"] > 0
        assert shown["time_s"] == pytest.approx(sum(s["time_s"] for s in shown["stages"]), abs=1)
        assert [s["name"] for s in shown["stages"]] == ["tokenizer", "pretrain", "sft", "eval", "report"]
        assert (shown["money_usd"] is None) == (not machine.gpus)
        assert shown["exports"]["gguf"]["possible"] and shown["exports"]["transformers"]["reason"]


def test_demo_plan_is_within_its_bars():
    found = plan.make_plan(config(preset="demo"), AMX)
    assert found.memory_bytes < 1.5 * GIB
    assert found.params.total == 1_048_580
    assert (found.pretrain.steps, found.sft.steps) == (140, 560)
    assert (found.dtype, found.attention, found.threads) == ("bfloat16", "matmul", 2)
    assert found.time_s < 220


@pytest.mark.parametrize(
    ("preset", "dtype", "measured"),
    [("demo", "bfloat16", 13_900), ("cpu-small", "bfloat16", 3_680), ("cpu-small", "float32", 1_757)],
)
def test_cpu_speed_is_what_was_measured(preset: str, dtype: str, measured: float):
    """Tokens a second of one Zen 4 thread, from the CPU-seconds of runs of different lengths."""
    zen4 = Machine("Linux", "cpu", frozenset({"avx2", "avx512f", "avx512_bf16"}), 2, 2, 23 * GIB, 20 * GIB, ())
    arch = plan.architecture(config(preset=preset))
    assert estimate.training_speed(arch, zen4, dtype, 1) == pytest.approx(measured, rel=0.15)
    assert estimate.training_speed(arch, zen4, dtype, 8) == 2 * estimate.training_speed(arch, zen4, dtype, 1)


def test_price_and_ranks():
    cfg = config(preset="d12")
    one, priced = plan.make_plan(cfg, H200), plan.make_plan(cfg, H200, price_per_hour=10.0)
    assert priced.money_usd == pytest.approx(10.0 * priced.time_s / 3600)
    assert one.money_usd == pytest.approx(3.5 * one.time_s / 3600)
    laptop = plan.make_plan(config(preset="demo"), LAPTOP, price_per_hour=1.0)
    assert laptop.money_usd == pytest.approx(laptop.time_s / 3600)
    pretrain = {s.name: s for s in one.stages}["pretrain"]
    assert pretrain.tokens == 2520 * 524288
    eight = {s.name: s for s in plan.make_plan(cfg, H200, ranks=8).stages}["pretrain"]
    assert eight.time_s < pretrain.time_s / 6


def test_memory_counts_every_holder():
    arch = plan.architecture(config(preset="cpu-small"))
    small = estimate.training_memory(arch, "float32", 1, "cpu", "sdpa")
    large = estimate.training_memory(arch, "float32", 8, "cpu", "sdpa")
    half = estimate.training_memory(arch, "bfloat16", 8, "cpu", "sdpa")
    matmul = estimate.training_memory(arch, "bfloat16", 8, "cpu", "matmul")
    assert small.weights == small.gradients == 4 * plan.num_params(arch).total
    assert large.activations == pytest.approx(8 * small.activations, rel=1e-6)
    assert half.activations < large.activations < 2 * half.activations
    assert half.compute_copy > 0 == large.compute_copy
    assert matmul.activations > half.activations


def test_known_dataset_needs_no_room():
    cfg = config(preset="cpu-small")
    fresh, there = plan.make_plan(cfg, LAPTOP), plan.make_plan(cfg, LAPTOP, dataset_chars=2_000_000)
    assert there.disk_bytes < fresh.disk_bytes


def test_exports_name_what_quantisation_needs():
    assert "K-quants" in plan.exports(plan.architecture(config(preset="demo")))["gguf"].reason
    assert "K-quants" not in plan.exports(plan.architecture(config(preset="d12")))["gguf"].reason
