"""Figures of a step."""

from __future__ import annotations

import psutil
import pytest
import torch

from picollm.train.metrics import Throughput, memory, peak_flops


def test_throughput() -> None:
    figures = Throughput(step_tokens=1000, step_flops=6e12, peak_flops=3e12, world=2)
    assert figures.tokens_per_s(0.5) == 2000
    assert figures.mfu(2.0) == pytest.approx(0.5)
    assert Throughput(1000, 6e12, None, 1).mfu(2.0) is None


def test_memory_of_a_cpu_is_the_process() -> None:
    found = memory(torch.device("cpu"))
    assert found.allocated_gib == found.reserved_gib
    assert 0 < found.allocated_gib < psutil.virtual_memory().total / 2**30


def test_a_cpu_has_no_sheet() -> None:
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
