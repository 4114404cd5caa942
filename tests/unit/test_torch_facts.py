"""The kept answer of the probe: when it is used, when it is asked again, and what a broken torch becomes."""

from __future__ import annotations

import json
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from picollm import torch_facts
from picollm.errors import HostError
from picollm.hardware import Machine

MACHINE = Machine("Linux", "a CPU", frozenset(), 2, 2, 2**33, 2**32, ())
FACTS = {"torch": "2.13.0+cpu", "build": "cpu"}


def test_the_requirement_is_the_declared_one() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert torch_facts.REQUIREMENT in project["dependencies"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time the probe was started."""
    calls: list[int] = []

    def run_probe() -> dict[str, Any]:
        calls.append(1)
        return FACTS

    monkeypatch.setattr(torch_facts, "run_probe", run_probe)
    return calls


def test_the_second_question_starts_no_process(asked: list[int], tmp_path: Path) -> None:
    assert torch_facts.torch_facts(MACHINE, tmp_path) == FACTS
    assert torch_facts.torch_facts(MACHINE, tmp_path) == FACTS
    assert len(asked) == 1


def test_another_cpu_torch_or_library_path_asks_again(
    asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_facts.torch_facts(MACHINE, tmp_path)
    torch_facts.torch_facts(replace(MACHINE, cpu_name="another CPU"), tmp_path)
    assert len(asked) == 2
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere/cudnn")
    torch_facts.torch_facts(replace(MACHINE, cpu_name="another CPU"), tmp_path)
    assert len(asked) == 3
    monkeypatch.setattr(torch_facts, "torch_version", lambda: "2.12.0")
    torch_facts.torch_facts(replace(MACHINE, cpu_name="another CPU"), tmp_path)
    assert len(asked) == 4


@pytest.mark.parametrize("content", [b"", b"{torn", b"[]", b'{"schema":1}', b"\xff\xfe", b'{"schema":2,"facts":{}}'])
def test_a_damaged_cache_is_replaced(asked: list[int], tmp_path: Path, content: bytes) -> None:
    (tmp_path / torch_facts.CACHE_NAME).write_bytes(content)
    assert torch_facts.torch_facts(MACHINE, tmp_path) == FACTS
    assert json.loads((tmp_path / torch_facts.CACHE_NAME).read_text())["facts"] == FACTS


def test_a_cache_that_cannot_be_written_is_no_error(asked: list[int], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert torch_facts.torch_facts(MACHINE, tmp_path / "file" / "base") == FACTS


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "cause"),
    [
        (3, '{"error": "ImportError: no libgomp"}\n', "", "ImportError: no libgomp"),
        (-11, "", "warning\nSegmentation fault\n", "killed by signal 11: Segmentation fault"),
        (1, "not json\n", "", "exit code 1"),
    ],
)
def test_a_probe_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, stdout: str, stderr: str, cause: str
) -> None:
    done = subprocess.CompletedProcess([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(HostError) as caught:
        torch_facts.torch_facts(MACHINE, tmp_path)
    assert cause in (caught.value.cause or "")
    assert "pip install" in (caught.value.hint or "")
    assert not (tmp_path / torch_facts.CACHE_NAME).exists()
