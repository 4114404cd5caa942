"""Sections 1 to 5 of the GPU probe: single kernels at the shapes of a training step.

Each section yields its rows as it measures them, so that a spent time budget loses only what was not begun. Inputs
are random: a GPU draws less power on zeros and runs faster than it ever will in training.

Letters: N tokens, C hidden size, V vocabulary, B rows, T tokens in a row, H heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from picollm.attention_choice import CUDNN_FAST_ATTENTION
from picollm.bench.profiling import kernel_times
from picollm.bench.rows import Row, Shapes
from picollm.bench.timing import copies_of, median_s, synchronize
from picollm.errors import first_line
from picollm.model.attention import causal_attention, cudnn_version
from picollm.model.fp8 import E4M3, E5M2
from picollm.model.functional import apply_rotary, relu_squared, rms_norm, rotary_table
from picollm.model.loss import linear_cross_entropy

Rows = Iterator[Row]
TERA = 1e12


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers, made in the wanted type: the largest buffers would not fit twice."""
    if dtype in (E4M3, E5M2):
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)
    return torch.randn(shape, device=device, dtype=dtype)


# -- 1 and 2: what this is, and what it can do at best ----------------------------------------------------------------


def identity(shapes: Shapes, device: torch.device) -> Rows:
    """Versions, and the kernel that full attention really runs: a system cuDNN may shadow the wheel's own."""
    yield Row("torch", torch.__version__)
    yield Row("triton", _version("triton"))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield Row("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        yield Row("cuDNN", float(cudnn_version() or 0), bound=float(CUDNN_FAST_ATTENTION))
        for name, value in _clocks(device).items():
            yield Row(name, value)
    q = randn(shapes.rows, shapes.widths[-1] // shapes.head_dim, shapes.row, shapes.head_dim, device=device)
    times = kernel_times(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)
    name = max(times, key=lambda key: times[key], default="none seen")
    cudnn_ran = any("cudnn" in key.lower() for key in times)
    yield Row("attention kernel", name, passed=cudnn_ran if device.type == "cuda" else None)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        yield Row("varlen_attn", "not in this torch")
    else:
        yield Row("varlen_attn", str(inspect.signature(varlen_attn)))


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _clocks(device: torch.device) -> dict[str, str]:
    """Clocks and power as the driver reports them; nothing where it does not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        clock = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)
        memory_clock = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        cap = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
    except Exception as error:  # a driver in a container may refuse any of these
        return {"clocks": f"not known: {first_line(error)}"}
    return {"highest clocks": f"{clock} MHz, memory {memory_clock} MHz", "power cap": f"{cap:.0f} W"}


def ceilings(shapes: Shapes, device: torch.device) -> Rows:
    """Copying, and the largest rate of products."""
    half = shapes.copy_bytes // 2
    source = torch.empty(half // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    seconds = _time(lambda i: target.copy_(source), shapes, device)
    yield Row("copy", 2 * half / seconds / TERA, "TB/s", bound=4.2)
    del source, target
    n = shapes.square
    a, b = randn(n, n, device=device), randn(n, n, device=device)
    yield Row("bf16 product", 2 * n**3 / _time(lambda i: a @ b.T, shapes, device) / TERA, "TFLOP/s", bound=770)
    a8, b8 = a.to(E4M3), b.to(E4M3)
    for fast in (True, False):
        seconds = _time(lambda i, fast=fast: _scaled(a8, b8, fast=fast), shapes, device)
        name = f"fp8 product, {'fast' if fast else 'exact'} accumulation"
        yield Row(name, 2 * n**3 / seconds / TERA, "TFLOP/s", bound=1300 if fast else None)


def _time(call: Callable[[int], object], shapes: Shapes, device: torch.device) -> float:
    return median_s(call, device, repeats=shapes.repeats, warmup=shapes.warmup)


def _scaled(a: Tensor, b: Tensor, *, fast: bool = False, out: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T of two 8-bit matrices, both stored by rows."""
    one = _one(a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=out, use_fast_accum=fast)


@functools.cache
def _one(device: torch.device) -> Tensor:
    """A scale, made once: a kernel that writes it would be timed with every product."""
    return torch.ones((), device=device)


# -- 3: products ------------------------------------------------------------------------------------------------------


def gemm(shapes: Shapes, device: torch.device) -> Rows:
    """Y = x W^T, dX = dY W and dW = dY^T x for every matrix of a block and for the head."""
    for C in shapes.widths:
        narrow = C < 1024
        small: dict[str, float] = {}
        for k, n in ((C, C), (C, 3 * C), (C, 4 * C), (4 * C, C), (C, shapes.vocab_size)):
            for kind, seconds in _products(shapes, device, k, n).items():
                rate = 2 * shapes.tokens * k * n / seconds / TERA
                bound = (450 if narrow else 600) if kind == "dW" else (600 if narrow else 680)
                yield Row(f"C {C}: {k} -> {n} {kind}", rate, "TFLOP/s", bound=bound)
                small.setdefault(f"{k}-{n}-{kind}", seconds)
        gain = 3 * small[f"{C}-{C}-dW"] / small[f"{C}-{3 * C}-dW"]
        yield Row(f"C {C}: dW of packed QKV, against three", gain, "x", bound=1.1)
    for C in shapes.widths[1:]:
        for k, n in ((C, C), (C, 3 * C), (C, 4 * C), (4 * C, C)):
            for kind, seconds in _fp8_products(shapes, device, k, n).items():
                rate = 2 * shapes.tokens * k * n / seconds / TERA
                bound = None if "turned" in kind else 900 if kind == "dW" else 1100
                yield Row(f"C {C}: fp8 {k} -> {n} {kind}", rate, "TFLOP/s", bound=bound)


def _products(shapes: Shapes, device: torch.device, k: int, n: int) -> dict[str, float]:
    """Seconds of the three products of one bf16 matrix."""
    turns = copies_of(2 * shapes.tokens * (k + n))
    x = [randn(shapes.tokens, k, device=device) for _ in range(turns)]
    dy = [randn(shapes.tokens, n, device=device) for _ in range(turns)]
    w = randn(n, k, device=device)
    return {
        "Y": _time(lambda i: x[i % turns] @ w.T, shapes, device),
        "dX": _time(lambda i: dy[i % turns] @ w, shapes, device),
        "dW": _time(lambda i: dy[i % turns].T @ x[i % turns], shapes, device),
    }


def _fp8_products(shapes: Shapes, device: torch.device, k: int, n: int) -> dict[str, float]:
    """The same in 8 bits, quantised before; `dW turned` also pays for the two transposed copies it needs."""
    turns = copies_of(shapes.tokens * (k + n))
    x = [randn(shapes.tokens, k, device=device, dtype=E4M3) for _ in range(turns)]
    dy = [randn(shapes.tokens, n, device=device, dtype=E5M2) for _ in range(turns)]
    w = randn(n, k, device=device, dtype=E4M3)
    w_t, x_t, dy_t = (m.t().contiguous() for m in (w, x[0], dy[0]))

    def turned(i: int) -> Tensor:
        a, b = dy[i % turns].t().contiguous(), x[i % turns].t().contiguous()
        return _scaled(a, b, out=torch.float32)

    return {
        "Y": _time(lambda i: _scaled(x[i % turns], w, fast=True), shapes, device),
        "dX": _time(lambda i: _scaled(dy[i % turns], w_t), shapes, device),
        "dW": _time(lambda i: _scaled(dy_t, x_t, out=torch.float32), shapes, device),
        "dW turned": _time(turned, shapes, device),
    }


# -- 4: attention -----------------------------------------------------------------------------------------------------

# (backend, with a window?) in the order of interest; the first is what the others are compared with.
ATTENTION = (
    ("cudnn", False), ("flash", False), ("varlen", False), ("varlen", True), ("flex", False), ("flex", True),
    ("fa3", False), ("fa3", True),
)  # fmt: skip
ATTENTION_ON_CPU = (("sdpa", False), ("matmul", False), ("sdpa", True))


def attention(shapes: Shapes, device: torch.device) -> Rows:
    """Forward and backward through the one door, per layer of each width; FLOPs as executed (14 C per visible key)."""
    kernels = ATTENTION if device.type == "cuda" else ATTENTION_ON_CPU
    T, W = shapes.row, shapes.window
    keys = {False: (T + 1) / 2, True: (W + 1) - (W + 1) * W / (2 * T)}  # a query sees itself and W behind
    reference: dict[int, float] = {}
    # Kernels outside, widths inside: a spent budget then costs the last kernels and not the largest models.
    for backend, windowed in kernels:
        for C in shapes.widths:
            shape = (shapes.rows, T, C // shapes.head_dim, shapes.head_dim)
            name = f"{backend}{f' window {W}' if windowed else ''}, H {shape[2]}"
            run = _attention_step(shape, device, backend, W if windowed else None)
            try:
                seconds = _time(run, shapes, device)
            except Exception as error:  # a kernel that this torch or GPU lacks is an answer too
                synchronize(device)
                yield Row(name, f"not here: {first_line(error)}")
                continue
            if not windowed:
                reference.setdefault(C, seconds)
            rate = 14 * C * keys[windowed] * shapes.rows * T / seconds / TERA
            detail = {"ms": round(1e3 * seconds, 3)}
            yield Row(name, rate, "TFLOP/s", bound=350 if backend == "cudnn" else None, detail=detail)
            if C in reference and seconds != reference[C]:
                at_most = 0.80 if windowed else None
                yield Row(f"{name}, time against the first", seconds / reference[C], "x", at_most=at_most)


def _attention_step(
    shape: tuple[int, ...], device: torch.device, backend: str, window: int | None
) -> Callable[[int], object]:
    if backend == "flex":
        torch._dynamo.reset()  # or it would now be compiled for any number of heads, and training's is fixed
    q, k, v = (randn(*shape, device=device).requires_grad_() for _ in range(3))
    grad = randn(*shape, device=device)

    def run(i: int) -> None:
        y = causal_attention(q, k, v, scale=shape[-1] ** -0.5, backend=backend, window=window)
        torch.autograd.grad(y, (q, k, v), grad)

    return run


# -- 5: what is not a product -----------------------------------------------------------------------------------------


def pointwise(shapes: Shapes, device: torch.device) -> Rows:
    """Compiled norm, rotation and relu^2, forward and backward, in bytes per second of what they must move; then the
    loss. The bytes per token are those of GPU.md 1.2.
    """
    for C in shapes.pointwise_widths:
        D, tokens = shapes.head_dim, shapes.tokens
        heads = C // D
        rotary = rotary_table(shapes.row, D, 10_000.0, torch.bfloat16, device)[:, None]
        rows = tokens // shapes.row

        def add_norm(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            total = a + b
            return total, rms_norm(total, 1e-6)

        def rotate(qk: Tensor, table: Tensor = rotary) -> Tensor:
            return rms_norm(apply_rotary(qk, table), 1e-6)

        cases: list[tuple[str, Callable[..., object], list[tuple[int, ...]], float]] = [
            ("residual add and norm", add_norm, [(tokens, C)] * 2, 16 * C),
            ("rotation and QK norm", rotate, [(rows, shapes.row, 2 * heads, D)], 20 * C),
            ("relu^2, output kept", relu_squared, [(tokens, 4 * C)], 40 * C),
            ("relu^2, input kept", lambda x: x.relu().square(), [(tokens, 4 * C)], 40 * C),
        ]
        for name, function, inputs, per_token in cases:
            seconds = _forward_backward(function, inputs, shapes, device)
            yield Row(f"C {C}: {name}", per_token * tokens / seconds / TERA, "TB/s", bound=3.4)
    yield from _loss(shapes, device)


def _forward_backward(
    function: Callable[..., object], inputs: list[tuple[int, ...]], shapes: Shapes, device: torch.device
) -> float:
    """Seconds of a compiled function and its backward pass; on a CPU, where compiling takes a minute, eager."""
    run = torch.compile(function, fullgraph=True, dynamic=False) if device.type == "cuda" else function
    values = [randn(*shape, device=device).requires_grad_() for shape in inputs]
    outputs = run(*values)
    grads = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def step(i: int) -> None:
        torch.autograd.grad(run(*values), values, grads[0] if len(grads) == 1 else grads)

    return _time(step, shapes, device)


def _loss(shapes: Shapes, device: torch.device) -> Rows:
    """Head and loss together: time beside its products, peak memory, and what chunks cost."""
    N, V, C = shapes.loss_rows, shapes.vocab_size, shapes.widths[-1]
    x = randn(N, C, device=device).requires_grad_()
    w = (0.02 * randn(V, C, device=device, dtype=torch.float32)).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    logits, half = randn(N, V, device=device), w.detach().bfloat16()
    products = _time(lambda i: (x.detach() @ half.T, logits @ half, logits.T @ x.detach()), shapes, device)
    copied = _time(lambda i: logits.clone(), shapes, device)
    least = 2 * copied  # bytes of the logits: read twice and written once forward, read and written backward (8 V)
    del logits, half
    for cap in (None, 15.0):
        whole: float | None = None
        for chunks in shapes.chunks:

            def step(i: int, chunks: int = chunks, cap: float | None = cap) -> None:
                parts = zip(x.chunk(chunks), targets.chunk(chunks), strict=True)
                losses = [
                    linear_cross_entropy(a, w, b, 1 / N, V, softcap=cap, compiled=device.type == "cuda")
                    for a, b in parts
                ]
                torch.autograd.grad(sum(losses), (x, w))

            name = f"loss{', softcap' if cap else ''}, {chunks} chunk{'s' if chunks > 1 else ''}"
            step(0)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                step(0)
                peak = (torch.cuda.max_memory_allocated(device) - before) / (2 * N * V)
                yield Row(f"{name}: peak memory", peak, "x bf16 logits", at_most=3.0)
            seconds = _time(step, shapes, device)
            beside = (seconds - products) / least
            detail = {"ms": round(1e3 * seconds, 3), "products ms": round(1e3 * products, 3)}
            yield Row(f"{name}: time beside products", beside, "x its bytes", at_most=1.35, detail=detail)
            whole = whole or seconds
            if chunks == 8:
                yield Row(f"{name}: against one", seconds / whole, "x", at_most=1.12)
