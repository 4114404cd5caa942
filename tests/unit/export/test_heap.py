"""What an export has freed is not held back from the process that llama.cpp runs in."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import numpy as np
from picollm.export import heap

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024

def holes(size, count):
    blocks = [np.ones(size << 18, np.float32) for _ in range(count)]
    return blocks[::10]  # what stays pins the heap that the others were in

if sys.argv[1] == "yes":
    heap.return_large_blocks()
del (first := [np.ones(30 << 18, np.float32)])[0]  # glibc learns from this one
before = resident()
large = holes(20, 11)
after_large = resident() - before
small = holes(1, 101)
if sys.argv[1] == "yes":
    heap.trim()
print(after_large, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such limit")
def test_freed_blocks_go_back_to_the_system() -> None:
    tuned = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # a user may have set such limits, or another malloc
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    grown = {}
    for ours in ("no", "yes"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, ours], capture_output=True, text=True, check=True, env=environment
        )
        grown[ours] = [int(word) for word in done.stdout.split()]
    # Kept are two blocks of 20 MiB and eleven of one; made were 220 and 321 MiB.
    assert grown["no"][0] > grown["yes"][0] + 100, grown
    assert grown["yes"][0] < 60 and grown["yes"][1] < 80, grown
