"""The table of GPU.md 4.2, row by row, and what a forced backend is refused for."""

from __future__ import annotations

import json

import pytest

from picollm.attention_choice import (
    BACKENDS,
    AttentionDevice,
    Kernel,
    choose_attention,
    kernel_family,
    mismatch,
    obstacle,
)
from picollm.errors import ConfigError

WHEEL = frozenset({"flash", "varlen", "flex"})  # what torch 2.11 for CUDA brings
CPU, MPS = AttentionDevice("cpu"), AttentionDevice("mps")
ROCM = AttentionDevice("cuda", rocm=True, installed=frozenset({"flex"}))


def nvidia(major: int, minor: int, *more: str, cudnn: int | None = 91501, installed: frozenset[str] = WHEEL):
    return AttentionDevice("cuda", (major, minor), cudnn, installed=installed | set(more))


H100, A100 = nvidia(9, 0), nvidia(8, 0)
ROWS = {
    "sm90": (H100, "bfloat16", "cudnn", "flex"),
    "sm90 with FA3": (nvidia(9, 0, "fa3"), "bfloat16", "cudnn", "fa3"),
    "sm90 without Triton": (nvidia(9, 0, installed=frozenset({"flash", "varlen"})), "bfloat16", "cudnn", "varlen"),
    "sm90, cuDNN too old": (nvidia(9, 0, cudnn=91500), "bfloat16", "flash", "flex"),
    "sm90, cuDNN too old, with FA3": (nvidia(9, 0, "fa3", cudnn=91002), "bfloat16", "fa3", "fa3"),
    "sm90, no cuDNN": (nvidia(9, 0, cudnn=None), "bfloat16", "flash", "flex"),
    "sm90, torch 2.9": (nvidia(9, 0, cudnn=91002, installed=frozenset({"flash"})), "bfloat16", "flash", "sdpa"),
    "sm90 in float32": (H100, "float32", "sdpa", "flex"),
    "sm100": (nvidia(10, 0), "bfloat16", "cudnn", "flex"),
    "sm103": (nvidia(10, 3), "bfloat16", "cudnn", "flex"),
    "sm80": (A100, "bfloat16", "flash", "varlen"),
    "sm86": (nvidia(8, 6), "bfloat16", "sdpa", "varlen"),
    "sm89, torch 2.10": (nvidia(8, 9, installed=frozenset({"flash", "flex"})), "bfloat16", "sdpa", "flex"),
    "sm120": (nvidia(12, 0), "bfloat16", "flash", "flex"),
    "sm120 without flash": (nvidia(12, 0, installed=frozenset({"flex"})), "bfloat16", "sdpa", "flex"),
    "sm75": (nvidia(7, 5), "float16", "sdpa", "sdpa"),
    "sm70": (nvidia(7, 0), "float16", "sdpa", "sdpa"),
    "ROCm": (ROCM, "bfloat16", "sdpa", "flex"),
    "MPS": (MPS, "float32", "sdpa", "sdpa"),
    "CPU": (CPU, "float32", "sdpa", "matmul"),
    "CPU in bfloat16": (CPU, "bfloat16", "matmul", "matmul"),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table(row: str) -> None:
    device, dtype, full, window = ROWS[row]
    chosen = choose_attention(device, dtype, 2048, windows=True, head_size=128)
    assert (chosen.full, chosen.window) == (full, window)
    assert chosen.reason and "None" not in chosen.reason
    assert choose_attention(device, dtype, 2048, head_size=128).window is None
    # What is chosen is not refused when it is asked for.
    assert choose_attention(device, dtype, 2048, requested=full).full == full
    assert obstacle(window, device, dtype, 128, windows=True) is None
    # The probe hands the device on as JSON.
    assert AttentionDevice.from_json(json.loads(json.dumps(device.to_json()))) == device


@pytest.mark.parametrize(
    ("row", "dtype", "full"), [(512, "float32", "matmul"), (513, "float32", "sdpa"), (2049, "bfloat16", "sdpa")]
)
def test_on_a_cpu_the_length_decides(row: int, dtype: str, full: str) -> None:
    assert choose_attention(CPU, dtype, row).full == full


def test_head_sizes_that_a_kernel_lacks_are_left_to_another() -> None:
    assert choose_attention(H100, "bfloat16", 2048, head_size=256).full == "flash"
    assert choose_attention(A100, "bfloat16", 2048, head_size=36, windows=True).full == "sdpa"


def test_an_old_cudnn_on_hopper_comes_with_its_remedy() -> None:
    slow = choose_attention(nvidia(9, 0, cudnn=91002), "bfloat16", 2048).slow
    assert slow and "9.10.2" in slow[0] and "LD_LIBRARY_PATH" in slow[1]
    assert choose_attention(H100, "bfloat16", 2048).slow is None
    assert choose_attention(nvidia(9, 0, "fa3", cudnn=91002), "bfloat16", 2048).slow is None


def test_windows_that_gain_nothing_are_said_to() -> None:
    without_triton = nvidia(9, 0, installed=frozenset({"flash", "varlen"}))
    assert "model.window_pattern=L" in choose_attention(without_triton, "bfloat16", 2048, windows=True).reason
    assert "model.window_pattern=L" not in choose_attention(H100, "bfloat16", 2048, windows=True).reason


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "options", "cause"),
    [
        (CPU, "bfloat16", "cudnn", {}, "an NVIDIA GPU, and this is a CPU"),
        (CPU, "bfloat16", "flex", {}, "no backward pass on a CPU"),
        (MPS, "float16", "flash", {}, "this is an Apple GPU"),
        (ROCM, "bfloat16", "varlen", {}, "this is an AMD GPU"),
        (nvidia(7, 5), "float16", "flash", {}, "compute capability 8.0, and this is a GPU of compute capability 7.5"),
        (A100, "bfloat16", "fa3", {}, "Hopper"),
        (H100, "bfloat16", "fa3", {}, "flash_attn_interface"),
        (H100, "float32", "cudnn", {}, "not in float32"),
        (H100, "bfloat16", "cudnn", {"head_size": 36}, "this is 36"),
        (H100, "bfloat16", "cudnn", {"windows": True}, "windows"),
        (H100, "bfloat16", "flash", {"windows": True}, "windows"),
        (nvidia(9, 0, cudnn=None), "bfloat16", "cudnn", {}, "no cuDNN"),
        (nvidia(9, 0, installed=frozenset({"flash"})), "bfloat16", "varlen", {}, "torch 2.11"),
        (nvidia(9, 0, installed=frozenset({"flash"})), "bfloat16", "flex", {}, "Triton"),
    ],
)
def test_a_forced_backend_that_cannot_work_is_refused_with_what_can(device, dtype, requested, options, cause) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_attention(device, dtype, 2048, requested=requested, **options)
    error = caught.value
    assert requested in error.message and cause in (error.cause or "")
    able = (error.hint or "").rpartition(": ")[2].split(", ")
    assert {"matmul", "sdpa"} <= set(able) <= set(BACKENDS) - {requested}
    for name in able:
        assert choose_attention(device, dtype, 2048, requested=name, **options).full == name


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "cudnn"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>", "flash"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<int>>>", "fa3"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "efficient"),
        ("triton_tem_fused_flex_attention_0", "flex"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 11, false, false>", "math"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, family: str) -> None:
    assert kernel_family(name) == family


def test_another_kernel_than_the_chosen_is_a_mismatch() -> None:
    flash, math = Kernel("flash", "flash_fwd_kernel"), Kernel("math", "softmax")
    what, remedy = mismatch("cudnn", flash) or ("", "")
    assert "flash (`flash_fwd_kernel`) ran" in what and "LD_LIBRARY_PATH" in remedy
    assert mismatch("sdpa", math) and mismatch("fa3", flash)
    assert mismatch("flash", flash) is None and mismatch("varlen", flash) is None and mismatch("matmul", math) is None
