"""`picollm bench`: what it refuses, what it prints, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picollm.bench.rows import Shapes
from picollm.errors import ConfigError, HostError, WorkerError
from picollm.hardware import Gpu
from picollm_cli.commands import bench
from picollm_cli.console import Output
from picollm_cli.main import _run

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "570.1")
TINY = Shapes(copy_bytes=4096, square=32, repeats=2, warmup=1)


def test_without_a_gpu_it_says_so_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clean_environment: Path
) -> None:
    monkeypatch.setattr("picollm.hardware.detect_gpus", lambda: ())
    assert _run(["bench", "gpu-probe", "--json"]) == HostError.exit_code
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["type"] == "HostError" and "picollm doctor" in error["hint"]
    assert "error: there is no CUDA GPU to measure" in captured.err
    assert not (clean_environment / "bench").exists()


def test_a_cpu_build_of_torch_beside_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picollm.hardware.detect_gpus", lambda: (H100,))
    monkeypatch.setattr("picollm.hardware.torch_drives_gpus", lambda: False)
    with pytest.raises(HostError, match="torch cannot use"):
        bench.gpu_probe()


def test_a_mistyped_section_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["bench", "gpu-probe", "--only", "atention"]) == ConfigError.exit_code
    assert "did you mean `--only attention`?" in capsys.readouterr().err


def test_the_worker_measures_and_its_rows_are_printed_and_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = tmp_path / "out" / "result.json"
    bench.probe(Output(), tmp_path / "folder", result, "cpu", ["ceilings"], TINY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("CPU, torch 2.")
    assert lines[1].startswith("2. ceilings: the fastest copy and product")
    assert any(line.split()[:2] == ["✗", "copy"] and "(>= 4.2)" in line for line in lines), lines
    found = json.loads(result.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[:2] == ["copy", "bf16 product"] and len(names) == 4
    assert found["missed"] and all(miss.startswith("ceilings: ") for miss in found["missed"])
    assert [(s["section"], s["error"], s["cut"]) for s in found["sections"]] == [("ceilings", None, False)]
    assert set(found["rows"][0]) == {
        "section", "name", "value", "unit", "bound", "at_most", "detail", "passed",
    }  # fmt: skip


def test_a_section_that_fails_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    impossible = Shapes(copy_bytes=4096, square=32, head_dim=0, repeats=1, warmup=1)
    with pytest.raises(WorkerError, match="1 of 2 sections failed") as caught:
        bench.probe(Output(), tmp_path / "folder", result, "cpu", ["attention", "ceilings"], impossible)
    assert caught.value.cause == "attention: ZeroDivisionError: integer division or modulo by zero"
    assert "copy" in [row["name"] for row in json.loads(result.read_text())["rows"]]


def test_a_worker_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="the probe died") as caught:
        bench.probe(Output(), tmp_path / "folder", tmp_path / "result.json", "no-such-device", ["ceilings"], TINY)
    assert "no-such-device" in str(caught.value.cause)
    assert str(tmp_path / "folder" / "log.txt") in str(caught.value.hint)
