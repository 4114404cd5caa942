"""One process needs no group: everything stays as it is. Two ranks are compared in tests/pipeline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from picollm.train import distributed

# Two ranks of gloo on this machine; each prints what it holds afterwards.
RANK = """
import torch
from picollm.train import distributed
torch.set_num_threads(1)
distributed.start()
rank = torch.distributed.get_rank()
a, b, c = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (1,)))
a.grad, b.grad = torch.full((2, 3), 1.0 + rank), torch.arange(4.0) * (1 + rank)
distributed.sum_gradients([a, b, c])
total = distributed.all_reduce_sum(torch.tensor([1.0, rank]))
assert c.grad is None
print(a.grad.flatten().tolist(), b.grad.tolist(), total.tolist())
distributed.stop()
"""


def test_one_process_has_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start()
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    distributed.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert distributed.all_reduce_sum(torch.tensor([3.0])).tolist() == [3.0]
    distributed.stop()
    distributed.stop()


def test_two_ranks_hold_the_sums() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert said == ["[3.0, 3.0, 3.0, 3.0, 3.0, 3.0] [0.0, 3.0, 6.0, 9.0] [2.0, 1.0]\n"] * 2
