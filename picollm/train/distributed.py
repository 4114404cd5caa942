"""Ranks and what they exchange; the only user of torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from picollm.errors import HostError

# Between two collectives each rank compiles by itself, and one whose save waits for its peers' files may come ten
# minutes late (`checkpoint_parts.PEER_TIMEOUT_S`). Evaluations do not count: ranks meet after each round of passes.
TIMEOUT = timedelta(minutes=30)

# Renamed in torch 2.13, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and what they exchange; the optimizer's `Ranks` protocol.

    Every call returns at once; its handle's `wait()` makes the result usable, on a GPU by making the current stream
    wait and not the host. With one rank nothing is sent.
    """

    rank: int
    world: int

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> dist.Work:
        """Sum `whole` (W * n) over ranks; rank r gets elements r * n to (r + 1) * n in `part`."""
        return _reduce_scatter(part, whole, async_op=True)

    def all_gather(self, whole: Tensor, part: Tensor) -> dist.Work:
        """Put the parts (n) of all ranks side by side into `whole` (W * n)."""
        return _all_gather(whole, part, async_op=True)

    def all_reduce(self, tensor: Tensor) -> Done | dist.Work:
        """Replace a tensor by its sum over ranks."""
        return dist.all_reduce(tensor, async_op=True) if self.world > 1 else Done()


class Done:
    """The handle of a message that nobody had to send."""

    def wait(self) -> None:
        pass


def ranks() -> Ranks:
    """The ranks of the process group; one alone where there is none."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks(0, 1)


def ranks_here() -> int:
    """Ranks on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start() -> torch.device:
    """Join the process group that torchrun describes in the environment; return this rank's device.

    Raises:
        HostError: more ranks on this machine than it has GPUs, or a torch without NCCL.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        _check_gpus(world, max(local + 1, ranks_here()))
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and device.type == "cuda":
        # With its device NCCL connects here, where a network that does not work is told at once, and takes its memory
        # before the model does; without it, in the first collective.
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    elif world > 1:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return device


def _check_gpus(world: int, here: int) -> None:
    """Refuse on every rank alike what NCCL would turn into a hang or a riddle.

    Args:
        here: ranks on this machine.
    """
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise HostError(
            f"{here} ranks on this machine, but torch sees {gpus} GPU{'s' if gpus != 1 else ''}",
            cause="each rank needs a GPU of its own",
            hint=f"start again with `--launch nproc={gpus}`, or look at CUDA_VISIBLE_DEVICES",
        )
    if world > 1 and not dist.is_nccl_available():
        raise HostError(
            "this torch has no NCCL, so its GPUs cannot talk to each other",
            cause=f"torch {torch.__version__} was built without it, as on Windows",
            hint="install a CUDA build of torch for Linux, or train on one GPU with `--launch nproc=1`",
        )


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; nothing to do for one."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(wishes: bool) -> bool:
    """Whether one of the ranks does; all take part, and each waits for the others."""
    if not dist.is_initialized():
        return wishes
    return bool(all_reduce_sum(torch.tensor(float(wishes), device=_device())) > 0)


def gather_texts(text: str) -> list[str]:
    """Every rank's text, by rank; all ranks take part. For what is said once, such as the verdict on a checkpoint."""
    if not dist.is_initialized():
        return [text]
    device = _device()
    world, data = dist.get_world_size(), text.encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    lengths = [int(size) for size in sizes]
    padded = torch.tensor(list(data.ljust(max(*lengths, 1), b" ")), dtype=torch.uint8, device=device)
    texts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(texts, padded)
    return [bytes(said[:length].tolist()).decode() for said, length in zip(texts, lengths, strict=True)]


def _device() -> torch.device:
    """Where the process group takes its messages from."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
