"""One optimizer step: gradients over micro-batches and ranks, one agreement, one update.

Nothing here waits for the device. Whether a step counts is decided on it (`keep`), and what the log wants is copied
to the host behind the step's back, to be read while the next one runs. On a CPU the same code reads for free.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from picollm.attention_choice import AttentionChoice
from picollm.config.recipe import TrainRecipe, TrainRuntime
from picollm.data.prefetch import StepBatches
from picollm.model import precision
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.train import distributed
from picollm.train.loss_scale import FLOOR, LossScale

MAX_BAD_STEPS = 3  # non-finite steps in a row before nothing is applied any more


@dataclass(frozen=True)
class StepResult:
    """What happened in a step; the same on every rank.

    Attributes:
        loss: mean over the tokens with loss, in nats.
        grad_norm: of the whole model's gradient, loss scale taken out.
        stop, save: some rank wanted it when the step began.
        kept: the step was finite and its update applied.
        bad_steps: steps in a row, this one included, that were not; overflows of the loss scale are none.
        loss_scale: the factor on this step's loss.
        ended_at: `time.monotonic()` of its end.
    """

    loss: float
    grad_norm: float
    stop: bool
    save: bool
    kept: bool
    bad_steps: int
    loss_scale: float
    ended_at: float


class Pending:
    """A step's figures on their way to the host."""

    def __init__(self, figures: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._ended_at = time.monotonic()
        if figures.is_cuda:
            self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            # `read` sleeps until it has come; spinning would keep a core from the prefetching and the saving thread.
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()
        else:
            self._figures = figures

    def read(self) -> StepResult:
        """Wait for the step to end, where it has not."""
        if self._copied is not None:
            self._copied.synchronize()
            self._ended_at = time.monotonic()
        loss, norm, stop, save, kept, bad, scale = self._figures.tolist()
        return StepResult(loss, norm, stop > 0, save > 0, kept > 0, int(bad), scale, self._ended_at)


class Trainer:
    """A model, its optimizer, and how a step is taken; knows no run, so that a benchmark uses it as it is."""

    def __init__(
        self, model: GPT, optimizer: MuonAdamW, device: torch.device, *, z_loss: float = 0.0, fp8: bool = False
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.z_loss, self.fp8 = z_loss, fp8
        self.loss_scale = LossScale(device) if model.compute_dtype == torch.float16 else None
        self._bad_steps = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)

    def step(self, number: int, batches: StepBatches, *, stop: bool = False, save: bool = False) -> Pending:
        """Take step `number` (from 0), unless its loss or gradient is not finite: then nothing changes, on no rank.

        Args:
            stop, save: what this rank wants the ranks to agree on.
        """
        if self.fp8:
            precision.refresh_fp8(self.model)
        loss_scale = self._one if self.loss_scale is None else self.loss_scale.scale.clone()
        figures = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, squared gradient norm, stop, save
        figures[0] = self._backward(batches, loss_scale)
        figures[1] = self.optimizer.grad_square()
        figures[2].fill_(stop)
        figures[3].fill_(save)
        loss, grad_square, stopping, saving = distributed.all_reduce_sum(figures)
        finite = loss.isfinite() & grad_square.isfinite()
        keep = self._count(finite, overflow=loss.isfinite() & ~finite & (loss_scale > FLOOR))
        self.optimizer.step(number, keep=keep, grad_scale=1.0 if self.loss_scale is None else 1 / loss_scale)
        if self.loss_scale is not None:
            self.loss_scale.update(finite)
        norm = grad_square.sqrt() / loss_scale
        said = (loss, norm, stopping, saving, keep, self._bad_steps, loss_scale)
        return Pending(torch.stack([figure.double() for figure in said]))

    def _backward(self, batches: StepBatches, loss_scale: Tensor) -> Tensor:
        """This rank's gradients, summed over micro-batches; returns its share of the loss (0-D float64)."""
        scale = 1.0 / max(1, batches.count)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, micro_batch in enumerate(batches.micro_batches):
            ids, wanted, *bounds = (x.to(self.device, non_blocking=True) for x in micro_batch)
            loss = self.model.loss(
                ids,
                wanted,
                scale=scale if self.loss_scale is None else scale * loss_scale,
                z_loss=self.z_loss,
                bounds=bounds[0] if bounds else None,
            )
            if i == len(batches.micro_batches) - 1:
                self.optimizer.last_micro_batch()
            loss.backward()
            total += loss.detach()
        return total / loss_scale

    def _count(self, finite: Tensor, overflow: Tensor) -> Tensor:
        """Count non-finite steps in a row and say whether this one is kept; after the third none is any more.

        The host learns of a step while the next one runs: without the latch that one could move weights which are
        about to be saved as the last good ones.
        """
        bad = torch.where(finite, 0.0, self._bad_steps + (~overflow).float())
        self._bad_steps = torch.where(self._bad_steps < MAX_BAD_STEPS, bad, self._bad_steps)
        return finite & (self._bad_steps < MAX_BAD_STEPS)


def build_trainer(
    recipe: TrainRecipe, runtime: TrainRuntime, attention: AttentionChoice, device: torch.device
) -> Trainer:
    """The recipe's model with its first weights, its optimizer, and what the runtime asks for."""
    compute = getattr(torch, recipe.dtype)
    model = GPT(recipe.model, compute_dtype=compute, backend=attention.full, window_backend=attention.window)
    if compute == torch.float64:
        model = model.double()
    model.init_weights(recipe.seed)
    model.to(device)
    model.activation_checkpointing = runtime.activation_checkpointing
    fp8 = recipe.fp8 and precision.use_fp8(model) > 0
    optimizer = MuonAdamW(
        model,
        recipe.rates,
        recipe.schedule,
        recipe.steps,
        # The polynomials' intermediate products need more range than float16 has.
        dtype=torch.float32 if compute == torch.float16 else compute,
        ranks=distributed.ranks(),
    )
    if runtime.compile:
        model.compile_blocks()
        optimizer.compile()
    return Trainer(model, optimizer, device, z_loss=recipe.z_loss, fp8=fp8)
