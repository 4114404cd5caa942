"""The probe's sections on a CPU at tiny sizes: a mistyped name must not wait for a paid GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from picollm.bench import gpu_probe, kernels, steps
from picollm.bench.gpu_probe import MEASURE, Spec, run
from picollm.bench.profiling import kind_of, shares
from picollm.bench.rows import Row, Shapes
from picollm.bench.sections import SECTIONS, Section
from picollm.bench.steps import Trainee, fitting, portable, trainee
from picollm.bench.timing import copies_of, median_s
from picollm.scaling import flops_per_token

CPU = torch.device("cpu")
TINY = Shapes(
    copy_bytes=4096, square=32, tokens=64, widths=(64, 128), pointwise_widths=(64,), vocab_size=160, loss_rows=64,
    chunks=(1, 2, 8), rows=2, row=32, head_dim=64, window=8, depths=(2, 2, 2), batches=(2, 4), micro_steps=2,
    learn_steps=6, repeats=2, warmup=1,
)  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_on_a_cpu(name: str) -> None:
    rows = [row.to_json() for row in MEASURE[name](TINY, CPU)]
    assert rows and len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        value = row["value"]
        assert isinstance(value, str) or value == value, row
        if row["unit"] in ("TFLOP/s", "TB/s", "tok/s", "ms"):
            assert value > 0 or row["name"].startswith("kernel"), row


def test_events_come_section_by_section_and_a_failure_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(shapes: Shapes, device: torch.device) -> Iterator[Row]:
        yield Row("before", 1.0)
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setitem(gpu_probe.MEASURE, "gemm", broken)
    events: list[tuple[str, dict[str, Any]]] = []
    assert not run(Spec("cpu", ("gemm", "ceilings"), TINY), lambda kind, **fields: events.append((kind, fields)))
    kinds = [kind for kind, _ in events]
    assert kinds == ["start", "section", "row", "section_end", "section", "row", "row", "row", "row", "section_end"]
    assert events[3][1]["error"] == "RuntimeError: no such kernel"
    assert events[-1][1]["error"] is None


def test_a_spent_budget_leaves_the_rest_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "ceilings", Section(0.0, "", ""))
    events: list[tuple[str, dict[str, Any]]] = []
    assert run(Spec("cpu", ("ceilings",), TINY), lambda kind, **fields: events.append((kind, fields)))
    assert [kind for kind, _ in events] == ["start", "section", "row", "section_end"]
    assert events[-1][1]["cut"] is True


def test_a_spec_survives_json() -> None:
    import json

    spec = Spec("cuda", ("gemm",), Shapes())
    values = {"device": "cuda", "sections": ["gemm"], "shapes": Shapes().to_json()}
    assert Spec.of(json.loads(json.dumps(values))) == spec


def test_rows_are_judged_by_their_bounds() -> None:
    assert Row("a", 2.0, bound=1.0).judged().passed is True
    assert Row("a", 2.0, at_most=1.0).judged().passed is False
    assert Row("a", 2.0).judged().passed is None
    assert Row("a", "not here", bound=1.0).judged().passed is None
    assert Row("a", "cudnn", passed=True).to_json()["passed"] is True


def test_a_missing_attention_kernel_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ATTENTION_ON_CPU", (("sdpa", False), ("varlen", True)))
    rows = list(kernels.attention(TINY, CPU))
    assert any(isinstance(row.value, str) and row.value.startswith("not here") for row in rows)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    tried: list[int] = []

    def make(rows: int) -> Trainee:
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trainee(portable(2, TINY), TINY, CPU, rows=rows)

    assert fitting(make, 8).ids.shape == (2, TINY.row)
    assert tried == [8, 4, 2]


def test_the_losses_that_fp8_is_judged_by_do_not_know_what_was_timed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "trainee", functools.partial(_without_fp8, steps.trainee))
    apart = [row for row in steps.eight_bits(TINY, CPU) if "apart from bf16" in row.name]
    assert [row.value for row in apart] == [0.0]


def _without_fp8(make: Callable[..., Trainee], *args: Any, fp8: bool = False, **options: Any) -> Trainee:
    return make(*args, **options)


def test_models_have_the_flops_of_the_roofline() -> None:
    """GPU.md 1.1, N full, in MFLOP per token."""
    for depth, expected in ((12, 887), (20, 3240), (24, 5285)):
        assert flops_per_token(portable(depth, Shapes())) / 1e6 == pytest.approx(expected, rel=0.005)


def test_kernels_have_kinds() -> None:
    for name, kind in {
        "sm90_xmma_gemm_bf16bf16": "GEMM",
        "nvjet_hsh_128x256": "GEMM",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "void pytorch_flash::flash_fwd_kernel": "attention",
        "triton_red_fused__log_softmax_3": "loss",
        "triton_poi_fused_relu_pow_1": "pointwise",
        "Memcpy DtoD (Device -> Device)": "copy",
        "triton_poi_fused_clone_transpose_2": "copy",
        "triton_tem_fused_mm_4": "GEMM",
        # Names that torch 2.13 gives to the parts of a block and of the loss.
        "triton_red_fused__scaled_dot_product_cudnn_attention_backward__scaled_mm_abs_amax_clone_mul_0": "pointwise",
        "triton_poi_fused__scaled_mm__to_copy_add_clamp_clone_div_mul_reciprocal_sum_t_view_5": "pointwise",
        "triton_red_fused__to_copy_add_amax_div_exp_gather_ge_log_mul_scatter_sub_sum_0": "loss",
        "triton_poi_fused_embedding_dense_backward_0": "embedding",
    }.items():
        assert kind_of(name) == kind, name
    found = shares({"gemm": 0.5, "triton_poi": 0.25}, 1.0)
    assert found == {"GEMM": 0.5, "pointwise": 0.25, "idle": 0.25}


def test_timing_is_the_median_after_warming_up() -> None:
    calls: list[int] = []
    assert median_s(calls.append, CPU, repeats=3, warmup=2) >= 0
    assert calls == [0, 1, 2, 3, 4]
    assert copies_of(1) == 16 and copies_of(2**40) == 1 and copies_of(100 * 2**20) == 3


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = Event.now

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def call(i: int) -> None:
        Event.now += [100, 100, 7, 5, 6][i]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert median_s(call, torch.device("cuda"), repeats=3, warmup=2) == pytest.approx(6e-3)
