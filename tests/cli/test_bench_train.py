"""`picollm bench train`: what it refuses before it measures, what it prints, what it keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from picollm.errors import ConfigError, HostError, IntegrityError, Interrupted, WorkerError
from picollm.hardware import Gpu, detect
from picollm_cli.commands import bench_train
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch
from picollm_cli.main import _run

TINY = (
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
    "model.max_position_embeddings=32", "tokenizer.vocab_size=320", "train.batch_tokens=64", "train.threads=1",
)  # fmt: skip


def line(*more: str) -> list[str]:
    sets = [word for key in TINY for word in ("--set", key)]
    return ["bench", "train", "--steps", "2", *sets, *more]


def fail_to_measure(*args: object) -> None:
    raise AssertionError("measured before everything was checked")


def test_a_grid_is_measured_kept_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_environment: Path
) -> None:
    kept = tmp_path / "new" / "speed.json"
    assert _run(line("--out", str(kept), "--vary", "model.arch=portable,full")) == 0
    captured = capsys.readouterr()
    titles = [text for text in captured.out.splitlines() if not text.startswith(" ")]
    assert [title.split(",")[0] for title in titles] == ["portable d2", "full d2"]
    assert "portable d2: timing steps…" in captured.err
    found = json.loads(kept.read_text())
    assert [cell["model"] for cell in found["cells"]] == ["portable", "full"]
    for cell in found["cells"]:
        assert {"tokens_per_s", "step_s", "first_step_s", "mfu", "mfu_causal", "peak_gib", "estimated_gib"} <= set(cell)
        assert set(bench_train.KEYS) < set(cell) and set(cell["parts_s"]) == {"forward", "backward", "update"}
        assert cell["tokens_per_s"] > 0 and cell["attention"] in ("matmul", "sdpa") and cell["batch_tokens"] == 64

    assert _run(line("--compare", str(kept), "--json")) == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert cell["earlier_tokens_per_s"] == found["cells"][0]["tokens_per_s"]

    bench_train._show(Output(), cell)
    assert f"x the earlier {cell['earlier_tokens_per_s']:,.0f}" in capsys.readouterr().out
    bench_train._show(Output(), cell | {"earlier_tokens_per_s": None})
    assert "which the earlier file does not have" in capsys.readouterr().out
    assert not (clean_environment / "runs").exists()


def test_two_processes_share_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(line("--launch", "nproc=2", "--json")) == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["ranks"], cell["device_batch"], cell["batch_tokens"]) == (2, 1, 64)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file or directory"),
        ("{", "is not readable JSON"),
        ("[1]", "holds no measurements"),
        ('{"a": 3}', "holds no measurements"),
        ('{"cells": [1]}', "holds no measurements"),
        ('{"cells": [{"tokens_per_s": "fast"}]}', "holds no measurements"),
    ],
)
def test_a_file_that_cannot_be_compared_with_is_refused_first(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "_cell", fail_to_measure)
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    code = _run(line("--compare", str(path)))
    assert code == (IntegrityError.exit_code if content == "{" else ConfigError.exit_code)
    said = capsys.readouterr().err
    assert words in said and str(path) in said and "picollm bench train --out FILE" in said


@pytest.mark.parametrize("name", ["/proc/x.json", "/dev/null/x.json", "."])
def test_a_place_that_cannot_be_written_is_refused_first(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "_cell", fail_to_measure)
    assert _run(line("--out", name)) == HostError.exit_code
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (("--vary", "model.depth"), "`--vary model.depth` cannot be read"),
        (("--vary", "train.steps="), "`--vary train.steps=` cannot be read"),
        (("--vary", "train.dtype=float32,flaot16"), '`train.dtype` cannot be "flaot16"'),
        (("--vary", "model.attention=sdpa,fa3"), "`model.attention=fa3` cannot work here"),
        (("--vary", "train.batch_tokens=64,65"), "`train.batch_tokens` (65) is not a multiple of 32"),
        (("--launch", "nproc=2,nnodes=2,rdzv=h:1"), "measures one machine"),
    ],
)
def test_the_whole_grid_is_checked_first(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picollm.hardware.detect_gpus", lambda: ())
    monkeypatch.setattr(bench_train, "_cell", fail_to_measure)
    assert _run(line(*more)) == ConfigError.exit_code
    assert words in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "570.1")
    monkeypatch.setattr("picollm.hardware.detect", lambda machine=replace(detect(), gpus=(gpu,)): machine)
    monkeypatch.setattr(bench_train, "_cell", fail_to_measure)
    assert _run(line("--launch", "nproc=2")) == ConfigError.exit_code
    assert "use `--launch nproc=1`" in capsys.readouterr().err


def test_a_model_that_memory_cannot_hold_is_refused_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(detect(), gpus=(), available_bytes=4 * 2**30)
    monkeypatch.setattr("picollm.hardware.detect", lambda: machine)
    monkeypatch.setattr(bench_train, "_cell", fail_to_measure)
    assert _run(["bench", "train", "--preset", "d32"]) == HostError.exit_code
    assert "portable d32 does not fit in memory" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def first_only(out: Output, plan: bench_train.Plan, *more: object) -> dict[str, int]:
        if plan.recipe.batch_tokens > 64:
            raise WorkerError("out of memory")
        return {"batch_tokens": plan.recipe.batch_tokens}

    monkeypatch.setattr(bench_train, "_cell", first_only)
    monkeypatch.setattr(bench_train, "_show", lambda *args: None)
    kept = tmp_path / "speed.json"
    assert _run(line("--vary", "train.batch_tokens=64,128", "--out", str(kept))) == WorkerError.exit_code
    assert [cell["batch_tokens"] for cell in json.loads(kept.read_text())["cells"]] == [64]


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"recipe": {}, "runtime": {}, "steps": 1}')
    with pytest.raises(WorkerError, match="the process that measures died") as caught:
        bench_train._run(Output(), tmp_path, Launch(), 1, "x")
    assert "Field required" in str(caught.value.cause) and "its last lines:" in str(caught.value.cause)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_processes(number: int, tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "picollm_cli", *line("--steps", "1000000")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if "timing steps" in said:
                break
        [folder] = tmp_path.glob("picollm-bench-*")
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == Interrupted.exit_code and "error: interrupted" in rest
    assert not folder.exists() and not measuring(folder)


def measuring(folder: Path) -> list[int]:
    """Processes that work on `folder`; a killed one may take a moment to go."""
    import psutil

    for _ in range(50):
        found = [p.pid for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]
        if not found:
            break
        time.sleep(0.1)
    return found
