"""Sections 6 to 9 of the GPU probe: whole training steps of the real model, optimizer and loss.

The tokens are synthetic and can be learnt (each follows from the one before), so a loss means something.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from picollm.attention_choice import attention_for
from picollm.bench.profiling import kernel_times, shares
from picollm.bench.rows import Row, Shapes
from picollm.bench.timing import synchronize
from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule, TrainRecipe, TrainRuntime
from picollm.model.attention import attention_device
from picollm.model.gpt import GPT
from picollm.model.linear import Linear
from picollm.model.loss import linear_cross_entropy
from picollm.model.precision import refresh_fp8
from picollm.scaling import causal_flops_per_token, flops_per_token, hidden_size_of
from picollm.train.metrics import peak_flops
from picollm.train.step import Trainer, build_trainer

Rows = Iterator[Row]
RATES = Rates(matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004, scalar_lr=0.5, weight_decay=0.0)
SCHEDULE = Schedule(
    warmup_steps=0, warmdown_steps=0, final_lr_fraction=1.0, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.95, momentum_ramp_steps=300,
)  # fmt: skip


def portable(depth: int, shapes: Shapes) -> Architecture:
    """The shape that `--set model.depth=…` gives."""
    hidden = hidden_size_of(depth)
    heads = hidden // shapes.head_dim
    return Architecture(
        arch="portable", hidden_size=hidden, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=shapes.head_dim, intermediate_size=4 * hidden,
        vocab_size=shapes.vocab_size, max_position_embeddings=shapes.row, rope_theta=100_000.0,
    )  # fmt: skip


@dataclass
class Trainee:
    """The trainer of the training loop, and one device batch for it."""

    arch: Architecture
    trainer: Trainer
    ids: Tensor
    targets: Tensor
    loss: Callable[[], Tensor]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def micro_step(self) -> Tensor:
        """Forward and backward of one device batch; returns the loss per token."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def update(self, step: int) -> None:
        """What a step does beside its micro-steps."""
        self.trainer.optimizer.grad_square()
        self.trainer.optimizer.step(step, keep=torch.ones((), device=self.device))
        if self.trainer.fp8:
            refresh_fp8(self.trainer.model)


def trainee(
    arch: Architecture, shapes: Shapes, device: torch.device, *, rows: int, whole: bool = False, fp8: bool = False
) -> Trainee:
    """A fresh model on the device, compiled there (per block, or `whole` as one graph) and run eagerly on a CPU.

    Loss and update are compiled apart in both, so that a comparison is one of the blocks.
    """
    on_gpu = device.type == "cuda"
    recipe = TrainRecipe(
        stage="pretrain", seed=0, model=arch, dtype="bfloat16", dtype_reason="", fp8=fp8, steps=10_000,
        batch_tokens=rows * shapes.row, rates=RATES, schedule=SCHEDULE, data=(), buffer_documents=1,
        tokenizer_sha256="",
    )  # fmt: skip
    runtime = TrainRuntime(
        ranks=1, threads=1, device_batch_size=rows, attention="auto", compile=on_gpu and not whole,
        checkpoint_every=1, keep_last=1, eval_every=None, eval_tokens=1,
    )  # fmt: skip
    attention = attention_for(arch, "bfloat16", attention_device(device))
    trainer = build_trainer(recipe, runtime, attention, device)
    first = torch.randint(arch.vocab_size, (rows, 1), generator=torch.Generator().manual_seed(0))
    steps = torch.arange(shapes.row + 1)[None]
    tokens = ((first + steps * (1 + first % 7)) % arch.vocab_size).to(device)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    model, scale = trainer.model, 1 / targets.numel()
    if not (whole and on_gpu):
        return Trainee(arch, trainer, ids, targets, lambda: model.loss(ids, targets, scale))
    trainer.optimizer.compile()
    model.rotary(shapes.row)  # made outside the graph, as it is between blocks
    hidden = torch.compile(GPT.hidden, fullgraph=True, dynamic=False)

    def loss() -> Tensor:
        x = hidden(model, ids).flatten(0, 1)
        return linear_cross_entropy(x, model.lm_head, targets.flatten(), scale, arch.vocab_size, compiled=True)

    return Trainee(arch, trainer, ids, targets, loss)


def fitting(make: Callable[[int], Trainee], rows: int) -> Trainee:
    """The trainee with the largest device batch, halved from `rows`, whose first steps fit into memory."""
    while True:
        try:
            subject = make(rows)
            for step in range(2):
                subject.micro_step()
                subject.update(step)
            synchronize(subject.device)
            return subject
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        subject = None  # its memory goes before the next is made
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2


def seconds_of(calls: Callable[[], object], count: int, device: torch.device) -> float:
    """Median seconds of a call that is far longer than its launch, each waited for."""
    seconds = []
    for _ in range(count):
        synchronize(device)
        started = time.perf_counter()
        calls()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def speed(subject: Trainee, shapes: Shapes, step_tokens: int) -> dict[str, float]:
    """Seconds of a micro-step and of the update, and from both tokens per second of a step of `step_tokens`."""
    device, tokens = subject.device, subject.ids.numel()
    micro = seconds_of(subject.micro_step, shapes.micro_steps, device)
    update = []
    for step in range(3):
        subject.micro_step()
        update.append(seconds_of(lambda step=step: subject.update(2 + step), 1, device))
    update_s = statistics.median(update)
    micro_steps = max(1, step_tokens // tokens)
    return {
        "micro_s": micro,
        "update_s": update_s,
        "tokens_per_s": micro_steps * tokens / (micro_steps * micro + update_s),
    }


def speed_rows(name: str, subject: Trainee, shapes: Shapes, step_tokens: int, mfu: float | None) -> Rows:
    """Tokens per second, MFU in both conventions and peak memory of a variant.

    Args:
        mfu: per cent of the peak that it must reach, attention counted in full.
    """
    found = speed(subject, shapes, step_tokens)
    detail: dict[str, float] = {"device batch": subject.ids.size(0), "micro ms": round(1e3 * found["micro_s"], 2)}
    if subject.device.type == "cuda":
        detail["peak GiB"] = round(torch.cuda.max_memory_allocated(subject.device) / 2**30, 1)
    yield Row(f"{name}: speed", found["tokens_per_s"], "tok/s", detail=detail)
    if (peak := peak_flops(subject.device, "bfloat16")) is not None:
        full, causal = (
            100 * found["tokens_per_s"] * flops(subject.arch) / peak
            for flops in (flops_per_token, causal_flops_per_token)
        )
        yield Row(f"{name}: MFU", full, "%", bound=mfu, detail={"causal %": round(causal, 1)})
    yield Row(f"{name}: optimizer", 1e3 * found["update_s"], "ms", at_most=45.0 if mfu == 55 else None)


# -- the sections -----------------------------------------------------------------------------------------------------


def small_step(shapes: Shapes, device: torch.device) -> Rows:
    """d12 at every device batch, compiled per block; then as one graph."""
    arch = portable(shapes.depths[0], shapes)
    reached: dict[bool, float] = {}
    for rows in shapes.batches:
        for whole in (False, True) if rows == shapes.batches[0] else (False,):
            _clear(device)
            subject = fitting(lambda rows, whole=whole: trainee(arch, shapes, device, rows=rows, whole=whole), rows)
            name = f"d{shapes.depths[0]}, B {rows}, {'one graph' if whole else 'per block'}"
            for row in speed_rows(name, subject, shapes, 2**19, None if whole else 50):
                if row.unit == "tok/s" and rows == shapes.batches[0]:
                    reached[whole] = float(row.value)
                yield row
            if whole:
                yield Row("per block against one graph", reached[False] / reached[True], "x", bound=0.99)
            del subject


def middle_step(shapes: Shapes, device: torch.device) -> Rows:
    """d20: a step of a million tokens, from its micro-steps and its update."""
    arch = portable(shapes.depths[1], shapes)
    _clear(device)
    subject = fitting(lambda rows: trainee(arch, shapes, device, rows=rows), shapes.rows)
    yield from speed_rows(f"d{shapes.depths[1]}, B {subject.ids.size(0)}", subject, shapes, 2**20, 55)


def eight_bits(shapes: Shapes, device: torch.device) -> Rows:
    """d24 in bf16 and in fp8: what each way of scaling costs, and the loss after some steps of each."""
    depth = shapes.depths[2]
    arch = portable(depth, shapes)
    losses: dict[bool, float] = {}
    base: float | None = None
    rows = shapes.rows
    for fp8 in (False, True):
        _clear(device)
        subject = fitting(lambda rows, fp8=fp8: trainee(arch, shapes, device, rows=rows, fp8=fp8), rows)
        rows = subject.ids.size(0)  # both with the same, or the comparison says nothing
        # Memory may have made it smaller; bf16 goes first because it needs more.
        if not fp8:
            micro = seconds_of(subject.micro_step, shapes.micro_steps, device)
            base = rows / micro
            yield Row(f"d{depth} bf16", base * shapes.row, "tok/s", detail={"device batch": rows})
        else:
            assert base is not None
            yield from _fp8_variants(subject, shapes, base)
        subject.trainer.optimizer.zero_grad()  # gradients of what was timed; there were more of them in fp8
        for step in range(2, shapes.learn_steps):
            loss = subject.micro_step()
            subject.update(step)
        losses[fp8] = float(loss)
        del subject
    apart = 100 * abs(losses[True] - losses[False]) / losses[False]
    detail = {"bf16": round(losses[False], 4), "fp8": round(losses[True], 4)}
    yield Row(f"fp8 loss after {shapes.learn_steps} steps, apart from bf16", apart, "%", at_most=1.0, detail=detail)


def _fp8_variants(subject: Trainee, shapes: Shapes, base: float) -> Rows:
    """From the dearest to what training uses: weights quantised once per step, fixed scale after norms."""
    linears = [layer for layer in subject.trainer.model.modules() if isinstance(layer, Linear)]
    scales = [layer.input_scale for layer in linears]

    def with_weights() -> None:
        refresh_fp8(subject.trainer.model)
        subject.micro_step()

    def measured(fixed: bool, call: Callable[[], object]) -> float:
        for layer, scale in zip(linears, scales, strict=True):
            layer.input_scale = scale if fixed else None
        for _ in range(2):  # another scale is another graph
            call()
        return subject.ids.size(0) / seconds_of(call, shapes.micro_steps, subject.device) / base

    name = "fp8 / bf16, "
    yield Row(f"{name}as trained: weights once, fixed scale", measured(True, subject.micro_step), "x", bound=1.22)
    yield Row(f"{name}every scale measured", measured(False, subject.micro_step), "x", bound=1.12)
    yield Row(f"{name}and weights per micro-step", measured(False, with_weights), "x")
    for layer, scale in zip(linears, scales, strict=True):
        layer.input_scale = scale


def breakdown(shapes: Shapes, device: torch.device) -> Rows:
    """One micro-step of d20 by kind of kernel, in per cent of its time."""
    arch = portable(shapes.depths[1], shapes)
    _clear(device)
    subject = fitting(lambda rows: trainee(arch, shapes, device, rows=rows), shapes.rows)
    wall = seconds_of(subject.micro_step, 3, device)
    times = kernel_times(subject.micro_step, device)
    found = shares(times, wall)
    bounds = {"idle": 2.0, "copy": 1.0}
    for kind, share in sorted(found.items(), key=lambda item: -item[1]):
        # On a CPU the operators of the profile overlap with nothing, so its idle time says nothing either.
        at_most = bounds.get(kind) if device.type == "cuda" else None
        yield Row(f"d{shapes.depths[1]}: {kind}", 100 * share, "%", at_most=at_most)
    for name in sorted(times, key=lambda key: -times[key])[:15]:
        yield Row(f"kernel {name[:90]}", 1e3 * times[name], "ms")


def _clear(device: torch.device) -> None:
    """What the section before held goes before the next model is made."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
