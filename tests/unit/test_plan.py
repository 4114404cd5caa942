"""Derived numbers: FACTS 2.1 where it does not depend on `full`, its twin for `portable`, and what fails."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from picollm import estimate, plan, rates, runtimes
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
H200_NODE = replace(H200, gpus=tuple(replace(H200.gpus[0], index=i) for i in range(8)))
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


@pytest.mark.parametrize("steps", [1, 20, 120, 360, 2520, 50_000])
def test_automatic_batch_for_steps_agrees_with_the_rule_for_tokens(steps):
    reference = rates.reference_tokens(12, 32768)
    batch = rates.auto_batch_tokens_for_steps(steps, reference)
    assert batch == rates.auto_batch_tokens(steps * batch, reference)


def test_automatic_batch_is_a_multiple_of_odd_rows():
    cfg = config("model.max_position_embeddings=1000", "train.steps=50")
    assert rates.pretrain_horizon(cfg, plan.architecture(cfg)).batch_tokens % 1000 == 0


def test_demo_rates():
    found = recipe(config(preset="demo")).rates
    assert found.matrix_lr == pytest.approx(0.02)
    assert found.embedding_lr == pytest.approx(0.05, rel=0.01)
    assert found.unembedding_lr == pytest.approx(0.004, rel=0.01)
    assert (found.value_embedding_lr, found.x0_lr, found.gate_lr) == (0, 0, 0)
    # the whole run decays by as much as a long one: rate x decay x steps is the timescale
    assert found.matrix_lr * found.weight_decay * 140 == pytest.approx(1 / 0.0709, rel=1e-4)
    assert recipe(config("train.weight_decay=false", preset="demo")).rates.weight_decay == 0


def test_adam_rates_follow_width_and_all_follow_batch():
    def of(batch: int, depth: int):
        steps = ["train.steps=2000", f"train.batch_tokens={batch}"]
        return recipe(config(*steps, f"model.depth={depth}", "model.arch=full")).rates

    small, large, wide = of(524288, 12), of(2097152, 12), of(524288, 48)
    for name in type(small).model_fields:
        if name != "weight_decay":
            assert getattr(large, name) == pytest.approx(2 * getattr(small, name)), name
    for name in ("embedding_lr", "unembedding_lr", "value_embedding_lr"):
        assert getattr(wide, name) == pytest.approx(getattr(small, name) / 2)
    for name in ("matrix_lr", "scalar_lr", "x0_lr", "gate_lr"):
        assert getattr(wide, name) == getattr(small, name)
    assert small.value_embedding_lr == small.embedding_lr / 2
    assert (small.x0_lr, small.gate_lr) == (0.5, 0.2)


@pytest.mark.parametrize(("tokens", "factor"), [(1, 0.1), (1_230_000, 0.111), (25e6, 0.5), (1e8, 1), (1e10, 1)])
def test_short_runs_take_a_tenth_of_the_rates_of_x0_and_gates(tokens, factor):
    assert rates.short_run_factor(tokens) == pytest.approx(factor, abs=1e-3)


def test_short_run_rates_reach_the_recipe_and_the_batch_factor_has_a_floor():
    found = recipe(config("model.arch=full", preset="cpu-small")).rates  # 360 steps of 4 096 tokens
    assert found.x0_lr == pytest.approx(0.5 * 0.8 * math.sqrt(360 * 4096 / 1e8), rel=1e-4)
    assert found.gate_lr == pytest.approx(0.2 * 0.8 * math.sqrt(360 * 4096 / 1e8), rel=1e-4)
    assert found.matrix_lr == pytest.approx(0.04 * 0.8) and rates.batch_lr_factor(4096) == 0.8


@pytest.mark.parametrize("flops", [1e15, 1e17, 4.33e19])
@pytest.mark.parametrize("arch", ["portable", "full"])
def test_a_horizon_in_flops_uses_its_real_tokens(flops, arch):
    cfg = config(f"train.target_flops={flops}", "train.ratio=100", f"model.arch={arch}", "model.depth=6")
    shape = plan.architecture(cfg)
    horizon = rates.pretrain_horizon(cfg, shape)
    per_step = plan.flops_per_token(shape) * horizon.batch_tokens
    assert horizon.steps == max(1, int(flops // per_step))
    reference = rates.reference_tokens(12, 32768)  # not the ratio's, which does not count here
    assert horizon.batch_tokens == rates.auto_batch_tokens(flops / plan.flops_per_token(shape), reference)
    assert horizon.batch_tokens == rates.auto_batch_tokens(horizon.tokens, reference)
    # the same steps and batch, asked for as such, are the same run
    asked = [f"train.steps={horizon.steps}", f"train.batch_tokens={horizon.batch_tokens}"]
    again = config(*asked, f"model.arch={arch}", "model.depth=6")
    assert rates.pretrain_horizon(again, shape) == horizon
    assert recipe(again).rates == recipe(cfg).rates


def test_steps_win_over_flops_and_flops_over_the_ratio():
    both = config("train.steps=7", "train.target_flops=1e18", "model.depth=4")
    assert rates.pretrain_horizon(both, plan.architecture(both)).steps == 7
    batch = "train.batch_tokens=65536"
    by_ratio, by_flops = config(batch, "model.depth=4"), config(batch, "model.depth=4", "train.target_flops=1e16")
    shape = plan.architecture(by_ratio)
    assert rates.pretrain_horizon(by_flops, shape).steps == int(1e16 / (plan.flops_per_token(shape) * 65536))
    assert rates.pretrain_horizon(by_ratio, shape).steps == int(12 * plan.num_params(shape).scaling / 65536)


def test_sft_scales_every_rate():
    pretrain = recipe(config("model.arch=full", preset="d12")).rates
    found = rates.sft_rates(pretrain, 0.5)
    for name in type(pretrain).model_fields:
        expected = 0 if name == "weight_decay" else getattr(pretrain, name) / 2
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 49, 120, 360, 2520, 100_000])
def test_schedules_fit_their_run(steps):
    for schedule in (rates.pretrain_schedule(steps), rates.sft_schedule(steps)):
        assert schedule.warmup_steps + schedule.warmdown_steps <= steps
        assert schedule.momentum_ramp_steps + schedule.warmdown_steps <= steps
        assert schedule.momentum_ramp_steps <= max(0.2 * steps, 0)
    pretrain = rates.pretrain_schedule(steps)
    assert 1 <= pretrain.warmup_steps <= 40
    assert pretrain.warmup_steps <= math.ceil(0.02 * steps)
    assert rates.sft_schedule(steps).warmup_steps <= 0.02 * steps


def test_schedule_of_a_long_run():
    schedule = rates.pretrain_schedule(10_000)
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
        ("cpu", "bfloat16", 2049, "auto", "sdpa"),
        ("cpu", "float32", 513, "auto", "sdpa"),
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
    assert runtimes.checkpoint_cadence(steps) == every


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
        assert (shown["copies_gib"] > 0) == bool(machine.gpus)  # a CPU's worker waits while it saves
        assert shown["time_s"] == pytest.approx(sum(s["time_s"] for s in shown["stages"]), abs=1)
        fetched = ["data"] if found.download_bytes else []
        assert [s["name"] for s in shown["stages"]] == [*fetched, "tokenizer", "pretrain", "sft", "eval", "report"]
        assert bool(fetched) == (config(preset=preset).data.dataset == "climbmix")
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
    eight = {s.name: s for s in plan.make_plan(cfg, H200_NODE, ranks=8).stages}["pretrain"]
    assert eight.time_s < pretrain.time_s / 6


def test_known_dataset_needs_no_room():
    cfg = config(preset="cpu-small")
    fresh, there = plan.make_plan(cfg, LAPTOP), plan.make_plan(cfg, LAPTOP, dataset_chars=2_000_000)
    assert there.disk_bytes < fresh.disk_bytes


def test_a_dataset_of_the_registry_is_counted_in_shards():
    cfg = config(preset="d12")
    found = plan.make_plan(cfg, H200)
    shards = math.ceil(found.pretrain.tokens * 4.5 / 250e6)
    assert found.download_bytes == (shards + 1) * 100_000_000
    assert found.disk_bytes > found.download_bytes
    there = plan.make_plan(cfg, H200, dataset_chars=shards * 250_000_000, missing_bytes=3)
    assert there.download_bytes == 3
    assert plan.make_plan(cfg, H200, dataset_chars=1).download_bytes == 0
    mixed = plan.make_plan(config("data.mix={climbmix=1, toy-world=3}", preset="d12"), H200)
    assert mixed.download_bytes == (math.ceil(shards / 4) + 1) * 100_000_000


def test_exports_name_what_quantisation_needs():
    assert "K-quants" in plan.exports(plan.architecture(config(preset="demo")))["gguf"].reason
    assert "K-quants" not in plan.exports(plan.architecture(config(preset="d12")))["gguf"].reason


def test_gguf_cannot_hold_tokens_of_two_digits():
    made = plan.make_plan(config("tokenizer.digits=2", preset="d12"), LAPTOP).exports
    assert not made["gguf"].possible and "tokenizer.digits" in made["gguf"].reason
    assert made["transformers"].possible
    assert plan.make_plan(config("tokenizer.digits=1", preset="d12"), LAPTOP).exports["gguf"].possible
    # named beside the features of the shape, not hidden by them
    both = plan.make_plan(config("tokenizer.digits=2", "model.arch=full", preset="d12"), LAPTOP).exports
    assert "tokenizer.digits" in both["gguf"].reason and "model.smear" in both["gguf"].reason


def test_exports_name_the_features_that_block_them():
    found = plan.exports(plan.architecture(config("model.arch=full", preset="d12")))
    for name in ("gguf", "transformers"):
        assert not found[name].possible
        for key in ("window_pattern", "logit_softcap", "value_embeddings", "x0_scalars", "smear", "backout"):
            assert f"`model.{key}" in found[name].reason
    # computed from features: the name alone blocks nothing, and one feature blocks alone
    off = [f"model.{key}=false" for key in ("value_embeddings", "x0_scalars", "smear", "backout")]
    windows = plan.architecture(config("model.arch=full", *off, preset="d12"))
    assert "model.window_pattern" in plan.exports(windows)["gguf"].reason
    only = plan.exports(plan.architecture(config("model.smear=true", preset="d12")))["gguf"]
    assert not only.possible and "smear" in only.reason and "backout" not in only.reason


# -- precision --------------------------------------------------------------------------------------------------------


def gpus(capability: tuple[int, int], gib: int = 80, count: int = 1) -> Machine:
    return replace(H200, gpus=tuple(Gpu(i, "GPU", gib * GIB, capability, "570.1") for i in range(count)))


@pytest.mark.parametrize(
    ("machine", "sets", "fp8", "because"),
    [
        (gpus((9, 0)), ["model.depth=24"], True, "wide enough"),
        (gpus((10, 0)), ["model.depth=32"], True, "wide enough"),
        (gpus((9, 0)), ["model.depth=12"], False, "below a width of 1536"),
        (gpus((8, 9)), ["model.depth=24"], False, "`train.fp8=true` tries it"),
        (gpus((12, 0)), ["model.depth=24"], False, "`train.fp8=true` tries it"),
        (gpus((8, 0)), ["model.depth=24"], False, "no 8-bit tensor cores"),
        (gpus((9, 0)), ["model.depth=24", "train.dtype=float32"], False, "go with bfloat16"),
        (LAPTOP, ["model.depth=24"], False, "GPUs alone"),
        (gpus((8, 9)), ["train.fp8=true"], True, "asks for it"),
        (gpus((9, 0)), ["model.depth=24", "train.fp8=false"], False, "forbids it"),
        (AMX, ["train.fp8=true"], True, "a CPU imitates it"),
    ],
)
def test_fp8_is_chosen_by_gpu_and_width(machine, sets, fp8, because):
    found = recipe(config(*sets), machine)
    assert found.fp8 is fp8 and because in found.fp8_reason


@pytest.mark.parametrize(
    ("machine", "sets", "words"),
    [
        (gpus((8, 0)), [], ["`train.fp8` (true)", "8.0", "begin at 8.9", "train.fp8=false"]),
        (gpus((9, 0)), ["train.dtype=float16"], ["`train.dtype` (float16)", "train.dtype=bfloat16"]),
        (LAPTOP, [], ["`train.dtype` (float32)", "train.dtype=bfloat16"]),
    ],
)
def test_fp8_that_cannot_be_had(machine, sets, words):
    with pytest.raises(ConfigError) as caught:
        recipe(config("train.fp8=true", *sets), machine)
    text = f"{caught.value.message} {caught.value.cause} {caught.value.hint}"
    assert all(word in text for word in words), text


def test_sft_keeps_fp8_where_the_machine_can():
    cfg = config(preset="d24")
    pretrain = recipe(cfg, H200)
    there = plan.sft_recipe(cfg, H200, pretrain, data=DATA, init_from="w", num_tokens=1)
    elsewhere = plan.sft_recipe(cfg, gpus((8, 0)), pretrain, data=DATA, init_from="w", num_tokens=1)
    assert (there.fp8, there.fp8_reason) == (True, "as in pretraining")
    assert not elsewhere.fp8 and "no 8-bit tensor cores" in elsewhere.fp8_reason


# -- memory and ranks -------------------------------------------------------------------------------------------------


def test_blocks_are_computed_twice_only_where_not_one_row_fits():
    long = ["model.max_position_embeddings=16384"]
    cfg = config(*long, preset="d24")
    kept = runtimes.fit(cfg, gpus((9, 0), 80), recipe(cfg, H200))
    assert not kept.activation_checkpointing
    small = gpus((9, 0), 32)
    tight = runtimes.fit(cfg, small, recipe(cfg, small))
    assert tight.activation_checkpointing and "computed twice" in tight.reason
    for forced, fitted in ((True, kept), (False, tight)):
        asked = config(*long, f"train.activation_checkpointing={str(forced).lower()}", preset="d24")
        machine = gpus((9, 0), 80) if forced else small
        found = runtimes.fit(asked, machine, recipe(asked, machine))
        assert found.activation_checkpointing is forced is not fitted.activation_checkpointing
    assert plan.train_runtime(cfg, small, recipe(cfg, small)).activation_checkpointing


def test_as_few_passes_as_fit():
    cfg = config(preset="d20")
    found = recipe(cfg, H200)
    fitted = runtimes.fit(cfg, H200, found)
    room = runtimes.memory_room(H200)
    assert fitted.rows * fitted.passes * 2048 == found.batch_tokens and fitted.memory.total <= room
    assert fitted.rows * 2048 <= runtimes.GPU_MICRO_BATCH_TOKENS
    asked = config(f"train.device_batch_size={2 * fitted.rows}", preset="d20")
    beyond = runtimes.fit(asked, H200, found)
    assert beyond.memory.total > room or 2 * fitted.rows * 2048 > runtimes.GPU_MICRO_BATCH_TOKENS
    node = runtimes.fit(cfg, H200_NODE, found, ranks=8)
    assert node.passes * 8 <= fitted.passes and node.memory.optimizer < fitted.memory.optimizer / 7


def test_a_model_that_does_not_fit_says_so():
    cfg = config("train.activation_checkpointing=false", preset="d32")
    tiny = gpus((9, 0), 8)
    found = runtimes.fit(cfg, tiny, recipe(cfg, tiny))
    assert found.rows == 1 and "not to fit" in found.reason and found.memory.total > runtimes.memory_room(tiny)


def test_more_ranks_than_gpus():
    plan.check_ranks(H200_NODE, 8)
    plan.check_ranks(LAPTOP, 8)  # cores are shared
    for machine, ranks, there in ((H200, 2, 1), (H200_NODE, 16, 8)):
        with pytest.raises(ConfigError) as caught:
            plan.check_ranks(machine, ranks)
        assert f"nproc={ranks}" in caught.value.message and f"nproc={there}" in caught.value.hint
    with pytest.raises(ConfigError, match="more processes than there are GPUs"):
        plan.make_plan(config(preset="d12"), H200, ranks=2)
    two_nodes = plan.make_plan(config(preset="d12"), H200_NODE, ranks=16, ranks_per_node=8)
    assert two_nodes.threads == 2 and two_nodes.fit.rows * two_nodes.fit.passes == 16


def test_forced_attention_that_cannot_work_is_refused_before_the_run():
    with pytest.raises(ConfigError, match=r"model\.attention=fa3"):
        plan.make_plan(config("model.attention=fa3", preset="d12"), gpus((8, 0)))
    with pytest.raises(ConfigError, match=r"model\.attention=flex"):
        plan.make_plan(config("model.attention=flex", preset="demo"), LAPTOP)
    assert plan.make_plan(config("model.attention=fa3", preset="d12"), H200).attention == "fa3"


def test_old_gpus_train_in_float16():
    found = plan.make_plan(config(preset="d12"), gpus((7, 0), 32))
    assert found.dtype == "float16" and "scaled" in found.recipe.dtype_reason and not found.recipe.fp8
