"""One process needs no group: everything stays as it is. Two ranks are compared in tests/pipeline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from picollm.errors import HostError
from picollm.train import distributed

# Two ranks of gloo on this machine; each prints what it holds afterwards.
RANK = """
import torch
from picollm.train import distributed
torch.set_num_threads(1)
distributed.start()
rank = torch.distributed.get_rank()
ranks = distributed.ranks()
assert (ranks.rank, ranks.world) == (rank, 2)
part, whole, both = torch.empty(2), torch.arange(4.0) + rank, torch.tensor([1.0 + rank])
works = [ranks.reduce_scatter(part, whole), ranks.all_reduce(both)]
for work in works:
    work.wait()
gathered = torch.empty(4)
ranks.all_gather(gathered, part + rank).wait()
total = distributed.all_reduce_sum(torch.tensor([1.0, rank]))
assert distributed.any_rank(rank == 1) and not distributed.any_rank(False)
print(part.tolist(), both.tolist(), gathered.tolist(), total.tolist())
distributed.stop()
"""


def test_one_process_has_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start()
    ranks, tensor = distributed.ranks(), torch.tensor([1.0, 2.0])
    assert (ranks.rank, ranks.world) == (0, 1)
    ranks.all_reduce(tensor).wait()
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.all_reduce_sum(torch.tensor([3.0])).tolist() == [3.0]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    distributed.stop()
    distributed.stop()


def test_two_ranks_hold_the_sums() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # gloo, also where there are GPUs
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert said == [
        "[1.0, 3.0] [3.0] [1.0, 3.0, 6.0, 8.0] [2.0, 1.0]\n",
        "[5.0, 7.0] [3.0] [1.0, 3.0, 6.0, 8.0] [2.0, 1.0]\n",
    ]


class NoGroup(Exception):
    """Raised where the process group would have been started."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch as on a machine with two GPUs; joining a group ends the call."""

    def joined(*_: object, **__: object) -> None:
        raise NoGroup

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    return 2


def test_more_ranks_than_gpus_are_refused(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(HostError, match="4 ranks on this machine, but torch sees 2 GPUs") as error:
        distributed.start()  # every rank says it, not only those without a GPU, so that none waits for the others
    assert "nproc=2" in str(error.value.hint)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(NoGroup):
        distributed.start()


def test_nccl_is_told_its_gpu(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **rest: told.extend((*args, rest)))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.start() == torch.device("cuda", 1) and distributed.ranks_here() == 2
    assert told == ["nccl", {"timeout": distributed.TIMEOUT, "device_id": torch.device("cuda", 1)}]


def test_missing_nccl_is_named(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(HostError, match="no NCCL") as error:
        distributed.start()
    assert "nproc=1" in str(error.value.hint)
