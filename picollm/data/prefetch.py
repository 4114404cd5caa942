"""Batches of the next step, made in a thread while the present one runs.

Tokenising and packing take a core's milliseconds, a step on a GPU not many more. Each step's batches carry the
position of the stream behind them, so that a checkpoint names the place of the step it belongs to, however far the
thread has run ahead.

Letters: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from picollm.data.packing import Batches

if TYPE_CHECKING:
    import torch

STEPS_AHEAD = 1
# How long a blocked thread takes to notice that nobody will ask again.
POLL_S = 0.1


@dataclass(frozen=True)
class StepBatches:
    """What one rank trains on in one step.

    Attributes:
        micro_batches: pairs (inputs, targets) of int64 tensors (B, T) in host memory, pinned for a GPU; the last may
            have fewer rows. Where attention stays inside documents also their bounds, int32, see `causal_attention`.
        count: positions that carry loss, over all micro-batches and ranks.
        position: state of the packer behind these rows, see RowPacker.state.
        epoch: passes over the documents by then.
    """

    micro_batches: list[tuple[torch.Tensor, ...]]
    count: int
    position: dict[str, Any]
    epoch: float


class Prefetcher:
    """Makes the batches of `steps` steps in a thread; `next` hands them out in order.

    The thread alone touches `batches` from here on. What it raises, `next` raises.

    Attributes:
        wait_s: seconds that `next` has waited in all; near zero where batches are made faster than they are used.
    """

    def __init__(self, batches: Batches, steps: int, device: torch.device) -> None:
        self.wait_s = 0.0
        self._batches, self._steps, self._device = batches, steps, device
        self._ready: queue.Queue[StepBatches | BaseException] = queue.Queue(STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> StepBatches:
        """The next step's batches; waits until they are made.

        Raises:
            Exception: whatever making them raised.
        """
        started = time.monotonic()
        made = self._ready.get()
        self.wait_s += time.monotonic() - started
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """End the thread and wait for it: at most the time of making one step's batches."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                import torch

                # A thread starts on GPU 0; pinning there would open a context of every rank on it.
                torch.cuda.set_device(self._device)
            for _ in range(self._steps):
                if self._closed.is_set():
                    return
                self._put(self._make())
        except BaseException as error:
            self._put(error)

    def _make(self) -> StepBatches:
        import torch

        arrays, count = self._batches.next_step()
        batches = [tuple(map(torch.from_numpy, batch)) for batch in arrays]
        if self._device.type == "cuda":
            batches = [tuple(tensor.pin_memory() for tensor in batch) for batch in batches]
        packer = self._batches.packer
        return StepBatches(batches, count, packer.state(), packer.epoch)

    def _put(self, made: StepBatches | BaseException) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(made, timeout=POLL_S)
                return
