"""The compiled model: same gradients, one graph per kind of block, and no more kept than is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("model_compiles.py")


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model(backend: str) -> None:
    """The first backend traces and partitions as inductor does, and needs no C++ compiler."""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), backend], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name, blocks in (("portable", 1), ("full", 5)):
        found = result[name]
        assert found["error"] < 1e-10, name
        # Blocks of a kind share a graph; beside them what comes before, what comes after, and the loss. Kinds of `full`
        # are window or not, value embedding or not, and the first block, whose stream is the embedding itself.
        assert found["graphs"] == 3 + blocks, name
        assert found["recomputed_equal"], name
        assert found["compiled_later"] == 0, name
    assert result["documents"]["error"] < 1e-10
    assert len(set(result["documents"]["graphs"])) == 1, "the number of documents must not need new code"
    assert result["whole"] == 1, "the probe's comparison wants the model in one graph"
    # In units of the stream: input 1, norms 1 + 1, q k v 3 (v is a view of them), normed q and k 2, attention 1, relu^2
    # 4, and some thing small per head. Were what is inside relu^2 kept too, it would be 4 more.
    assert 13 <= result["saved"] < 14
