"""Saving a training while it goes on: the state is copied, and a thread of each rank writes its part."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picollm.errors import HostError, PicollmError, WorkerError, first_line
from picollm.files import SCHEMA, disk_errors
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.run_dir import StageDir
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_parts as parts
from picollm.train import checkpoint_tensors as tensors
from picollm.train import distributed


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its step, folder, size, and the seconds from the call of `save` to the commit."""

    step: int
    path: Path
    bytes: int
    dt_s: float


@dataclass(frozen=True)
class _Work:
    """One save as its thread sees it: nothing here changes any more while training goes on."""

    step: int
    temporary: Path
    attempt: str
    weights: dict[str, Tensor]  # empty on ranks above 0
    state: dict[str, Tensor]
    where: dict[str, dict[str, list[int]]]
    meta: dict[str, Any]
    started: float


class Saver:
    """Writes checkpoints of a stage, one at a time.

    A periodic save that fails (the disk is full, a rank did not write its part) must not cost the training: with
    `warn` it is told there, earlier checkpoints stay as they were, and training goes on to the next save. The last
    one is not forgiven: `wait` raises when the newest save failed. Without `warn` every failure is raised, by
    whichever of `save`, `finished` and `wait` meets it first.

    Args:
        keep_last: checkpoints to keep; the newest is always among them.
        asynchronous: `save` returns when the state is copied, and a thread writes it. The copy takes as much host
            memory as weights and state of the rank (`memory.copies_bytes`) and keeps it; where that is not to be had,
            saving becomes synchronous, which needs room for one tensor.
        stopped: whether this rank was asked to end; see `checkpoint_parts.await_end`.
        attempt: a name that all ranks know and no other start of this stage has; None agrees on one, which every
            rank must take part in.
        timeout_s: how long a rank waits for the others' files.
    """

    def __init__(
        self,
        stage: StageDir,
        rank: int,
        world: int,
        *,
        keep_last: int,
        asynchronous: bool,
        warn: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        attempt: str | None = None,
        timeout_s: float = parts.PEER_TIMEOUT_S,
    ) -> None:
        self.stage, self.rank, self.world = stage, rank, world
        self.keep_last, self.asynchronous, self.warn, self.timeout_s = keep_last, asynchronous, warn, timeout_s
        self.stopped = stopped
        self.attempt = attempt or distributed.gather_texts(secrets.token_hex(4))[0]
        self._serial = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[Saved | None]] | None = None
        self._buffers: list[dict[str, Tensor]] = []
        self._saved: list[Saved] = []
        self._failure: PicollmError | None = None

    def save(self, step: int, model: GPT, optimizer: MuonAdamW, meta: dict[str, Any]) -> None:
        """Save the state after a step. Every rank calls it, in the same order.

        Waits for the save before it, if that is still being written.

        Args:
            meta: JSON that the caller needs to go on (data position, hashes); step and architecture are added.
        """
        started = time.monotonic()
        self._settle()
        self._serial += 1
        attempt = f"{self.attempt}-{self._serial}"
        shards = [shard for shard in optimizer.shards() if shard.rows[0] < shard.rows[1]]
        state = {shard.name: shard.tensor for shard in shards}
        assert len(state) == len(shards), "a rank has one range of rows of a tensor"
        weights, state = self._still(dict(model.named_parameters()) if self.rank == 0 else {}, state)
        work = _Work(
            step=step,
            temporary=files.temporary_dir(self.stage, step, attempt),
            attempt=attempt,
            weights=weights,
            state=state,
            where={shard.name: {"shape": list(shard.shape), "rows": list(shard.rows)} for shard in shards},
            # Through JSON: a copy, and a complaint here about what cannot be written.
            meta=json.loads(json.dumps({"schema": SCHEMA, "step": step, "model": model.arch.model_dump(), **meta})),
            started=started,
        )
        self._pending = step, self._thread.submit(self._write, work)
        if not self.asynchronous:
            self._settle()

    def finished(self) -> list[Saved]:
        """Checkpoints committed since the last call; rank 0 only, nothing on the others."""
        if self._pending is not None and self._pending[1].done():
            self._settle()
        saved, self._saved = self._saved, []
        return saved

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when every save is committed.

        Raises:
            TimeoutError: after `timeout_s`.
            HostError: the newest could not be written.
            WorkerError: another rank did not write its part of it, or rank 0 did not commit it.
        """
        self._settle(timeout_s)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    # -- on the main thread ------------------------------------------------------------------------------------------

    def _settle(self, timeout_s: float | None = None) -> None:
        """Wait for the save in flight and note how it ended."""
        if self._pending is None:
            return
        if wait([self._pending[1]], timeout_s).not_done:
            raise TimeoutError
        (step, future), self._pending = self._pending, None
        try:
            saved = future.result()
        except (HostError, WorkerError) as error:
            if self.warn is None:
                raise
            self._failure = error
            reason = f": {error.cause}" if error.cause else ""
            self.warn(f"step {step} could not be saved ({error.message}{reason}); trying again at the next save")
        else:
            self._failure = None
            if saved is not None:
                self._saved.append(saved)

    def _still(self, *groups: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors as they are now: copies in host memory if training goes on while they are written."""
        if not self.asynchronous:
            return list(groups)
        try:
            return self._copies(groups)
        except (RuntimeError, MemoryError) as error:  # host memory, or its share that can be pinned, is used up
            reason = first_line(error)
        self.asynchronous = False
        self._buffers.clear()
        if torch.cuda.is_initialized():
            torch._C._host_emptyCache()  # or torch keeps what it has pinned
        if self.warn is not None:
            self.warn(f"no memory to save beside training ({reason}); training waits while it saves")
        return list(groups)

    def _copies(self, groups: tuple[dict[str, Tensor], ...]) -> list[dict[str, Tensor]]:
        if not self._buffers:
            self._buffers = [tensors.host_buffers(group) for group in groups]
        for group, copies in zip(groups, self._buffers, strict=True):  # what an earlier save left there is written
            for name, tensor in group.items():
                copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        for gpu in {tensor.device for group in groups for tensor in group.values() if tensor.is_cuda}:
            torch.cuda.current_stream(gpu).synchronize()  # the next step overwrites what is being copied
        return self._buffers

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _write(self, work: _Work) -> Saved | None:
        """Write this rank's part; on rank 0, also the rest, and commit."""
        temporary = work.temporary
        file = parts.part_name(self.rank, self.world)
        for tensor in (*work.weights.values(), *work.state.values()):
            if tensor.is_cuda:  # not copied yet; a thread starts on GPU 0, where other ranks' memory is
                torch.cuda.set_device(tensor.device)
                break
        try:
            files.begin(self.stage, work.step, work.attempt, rank=self.rank)
            part = tensors.write_part(temporary / "state" / file, work.state, work.where)
            if self.rank == 0:
                return self._complete(work, part)
            parts.announce(temporary, part)
        except BaseException as error:
            if self.rank == 0:
                files.discard(temporary)
            else:
                with contextlib.suppress(HostError):  # rank 0 will find out by itself
                    parts.announce_failure(temporary, file, getattr(error, "cause", None) or repr(error))
            raise
        parts.await_end(temporary, timeout_s=self.timeout_s, stopped=self.stopped)
        return None

    def _complete(self, work: _Work, own: parts.Part) -> Saved:
        temporary = work.temporary
        known = {tensors.WEIGHTS: tensors.write_tensors(temporary / tensors.WEIGHTS, work.weights)}
        others = [parts.part_name(rank, self.world) for rank in range(1, self.world)]
        all_parts = [own, *parts.await_parts(temporary, others, timeout_s=self.timeout_s)]
        known |= {f"state/{part.file}": part.sha256 for part in all_parts}
        with disk_errors(temporary):
            (temporary / parts.INDEX).write_text(json.dumps(parts.build_index(all_parts), indent=1) + "\n")
            files.write_meta(temporary, work.meta)
        parts.read_index(temporary)  # what could not be read back is not committed
        size = files.commit(self.stage, work.step, temporary, keep_last=self.keep_last, known=known)
        path = files.checkpoint_dir(self.stage, work.step)
        return Saved(work.step, path, size, round(time.monotonic() - work.started, 3))
