"""The real probe, once, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import picollm
from picollm.attention_choice import AttentionDevice
from picollm.hardware import detect
from picollm.stages import probe
from picollm.torch_facts import CACHE_NAME, torch_facts


def test_the_probe_says_what_torch_can_do_and_keeps_it(clean_environment: Path) -> None:
    machine = detect()
    facts = torch_facts(machine)
    assert facts["torch"].startswith("2.")
    assert facts["cuda"]["available"] is bool(facts["devices"])
    assert facts["cuda"]["available"] or facts["cuda"]["reason"]
    for name in ("fp32", "bf16"):
        assert facts[name]["works"] and facts[name]["error"] is None
    assert bool(facts["fp16"]) is bool(facts["devices"])
    # The slowest machine that anybody would train on, and more than any core there is.
    assert facts["cuda"]["available"] or 1e8 < facts["fp32"]["flops_per_s"] < 2e12
    assert {"matmul", "sdpa"} <= set(facts["attention"]["kernels"]) and not facts["attention"]["broken"]
    assert AttentionDevice.from_json(facts["attention"]["device"]).type == ("cuda" if facts["devices"] else "cpu")
    assert facts["distributed"]["gloo"] is True
    assert set(facts["compile"]) == {"compiler", "triton"}
    assert json.loads((clean_environment / CACHE_NAME).read_text())["facts"] == facts


def test_a_torch_that_cannot_be_imported_is_reported_as_json(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')\n")
    code = "import sys, runpy; sys.path.insert(0, sys.argv[1]); "
    code += "runpy.run_module('picollm.stages.probe', run_name='__main__')"
    source = str(Path(picollm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(broken)], capture_output=True, text=True, check=False, cwd=source
    )
    assert done.returncode == 3
    assert json.loads(done.stdout) == {"error": "OSError: libtorch_cpu.so: cannot open shared object file"}


def test_a_cudnn_older_than_torchs_own_is_a_version_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does with such a one in `LD_LIBRARY_PATH`: it raises at the first question and answers the second."""
    answers: list[Any] = [RuntimeError("cuDNN version incompatibility"), 91002]

    def version() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert probe._cuda(torch) == {"available": True, "reason": None, "cudnn": 91002}
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)  # a build without it
    assert probe._cuda(torch)["cudnn"] is None


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_that_ran_is_named() -> None:
    facts = torch_facts(detect())
    assert facts["cuda"]["available"], facts["cuda"]["reason"]
    assert facts["attention"]["kernels"]["sdpa"]["name"]
    assert facts["bf16"]["flops_per_s"] > facts["fp32"]["flops_per_s"]
