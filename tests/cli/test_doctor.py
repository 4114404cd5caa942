"""`picollm doctor`: the shape of its answer, its exit codes, and what each check says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from picollm import torch_facts
from picollm.attention_choice import AttentionDevice
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.hardware import Gpu, Machine
from picollm.run_dir import RunDir
from picollm_cli import machine_checks
from picollm_cli.checks import CHECKS, run_check
from picollm_cli.commands.doctor import doctor
from picollm_cli.inspection import Check, Inspection

# fmt: off
REQUIRED = [
    "python", "packages", "package.conflict", "torch", "device", "dtype", "attention", "cores", "memory", "disk.room",
    "disk.writable", "base_dir", "dataset", "tokenizer", "plan.memory", "plan.time",
]
# fmt: on
FACTS: dict[str, Any] = {
    "torch": "2.13.0+cpu",
    "build": "cpu",
    "cuda": {"available": False, "reason": "Torch not compiled with CUDA enabled", "cudnn": None},
    "devices": [],
    "cpu_capability": "AVX512",
    "fp32": {"works": True, "error": None, "flops_per_s": 80e9},
    "bf16": {"works": True, "error": None, "flops_per_s": 200e9},
    "fp16": None,
    "attention": {"device": AttentionDevice("cpu").to_json(), "kernels": {"matmul": None, "sdpa": None}, "broken": {}},
    "distributed": {"gloo": True, "nccl": False},
    "compile": {"compiler": "g++", "triton": False},
}
CPU = Machine("Linux", "a CPU", frozenset({"avx512_bf16"}), 4, 8, 32 * 2**30, 16 * 2**30, ())
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), "570.1")
GPU_FACTS = FACTS | {
    "build": "cuda 12.8",
    "cuda": {"available": True, "reason": None, "cudnn": 91501},
    "devices": [{"name": H100.name, "memory_bytes": H100.memory_bytes, "capability": [9, 0]}],
    "attention": {
        "device": AttentionDevice("cuda", (9, 0), 91501, installed=frozenset({"flash", "varlen", "flex"})).to_json(),
        "kernels": {"cudnn": {"family": "cudnn", "name": "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"}},
        "broken": {},
    },
}
app = typer.Typer()
app.command()(doctor)


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real probe has its own test; here its answer is fixed, and so are the GPUs."""
    monkeypatch.setattr("picollm.hardware.detect_gpus", lambda: ())
    monkeypatch.setattr(torch_facts, "run_probe", lambda: FACTS)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def inspect(machine: Machine = CPU, facts: dict[str, Any] = FACTS, **options: Any) -> Inspection:
    """An inspection of a given machine instead of this one."""
    at = Inspection(**({"preset": "demo"} | options))
    at.__dict__.update(machine=machine, torch=facts)  # where cached properties keep what they found
    return at


# -- the command ------------------------------------------------------------------------------------------------------


def test_json_has_every_check_once_and_in_order() -> None:
    result = run("--json")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert len(result.stdout.splitlines()) == 1
    assert [check["id"] for check in answer["checks"]] == REQUIRED
    for check in answer["checks"]:
        assert set(check) == {"id", "level", "detail", "fix"}
        assert check["level"] in ("ok", "info", "warn", "block")
        assert check["detail"] and "not known" not in check["detail"], check
        assert check["fix"] or check["level"] in ("ok", "info"), check
    assert answer["ok"] is True
    assert result.exit_code == 0


def test_human_output_reads_without_colour_and_ends_with_the_next_command() -> None:
    result = run()
    lines = result.stdout.splitlines()
    assert "\x1b" not in result.stdout
    assert [line.split()[2] for line in lines if line[:1] in "✓·!✗" and line] == REQUIRED
    assert all(line.split()[1] in ("ok", "info", "warning") for line in lines if line[:1] in "✓·!✗" and line)
    assert lines[-1].startswith("This machine is ready for preset `demo`")
    assert lines[-1].endswith("`picollm speedrun --preset demo`")
    assert result.exit_code == 0


def test_list_names_every_check() -> None:
    result = run("--list")
    assert [line.split()[0] for line in result.stdout.splitlines()] == REQUIRED == list(CHECKS)
    listed = json.loads(run("--list", "--json", "cores").stdout)
    assert [check["id"] for check in listed["checks"]] == ["cores"]


def test_named_checks_run_alone() -> None:
    result = run("--json", "base_dir", "python")
    assert [check["id"] for check in json.loads(result.stdout)["checks"]] == ["python", "base_dir"]
    assert "2 of 16" in run("base_dir", "python").stdout


@pytest.mark.parametrize(
    ("arguments", "error", "near"),
    [
        (["memry"], ConfigError, "memory"),
        (["--preset", "dmeo"], ConfigError, "demo"),
        (["--set", "train.stps=3"], ConfigError, "train.steps"),
        (["--config", "missing.toml"], ConfigError, "TOML"),
        (["--run", "nowhere"], MissingArtifact, "picollm runs"),
    ],
)
def test_wrong_arguments_are_errors_with_the_nearest_name(arguments: list[str], error: type, near: str) -> None:
    raised = run(*arguments).exception
    assert isinstance(raised, error)
    assert near in raised.hint


def test_a_blocker_prints_the_answer_and_exits_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("keep me")
    monkeypatch.setenv("PICOLLM_BASE_DIR", str(tmp_path / "file" / "base"))
    result = run("--json", "disk.writable", "python")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 3
    assert answer["ok"] is False
    assert [check["level"] for check in answer["checks"]] == ["ok", "block"]
    assert result.stderr.splitlines() == ["blocked by: disk.writable"]
    human = run("disk.writable")
    assert human.stdout.startswith("✗ blocks")
    assert "\n    fix: set PICOLLM_BASE_DIR" in human.stdout
    assert human.stdout.splitlines()[-1] == "1 check blocks"
    assert (tmp_path / "file").read_text() == "keep me"


def test_exit_code_3_comes_through_the_error_layer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "picollm_cli", "doctor", "--json", "disk.writable"],
        capture_output=True, text=True, check=False, env=os.environ | {"PICOLLM_BASE_DIR": str(tmp_path / "file/base")},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["ok"] is False
    assert done.stderr == "blocked by: disk.writable\n"


def test_a_broken_user_config_hides_no_other_finding(tmp_path: Path) -> None:
    user = tmp_path / "config" / "picollm" / "config.toml"
    user.parent.mkdir(parents=True)
    user.write_text("[train]\nstps = 3\n")
    levels = {check["id"]: check["level"] for check in json.loads(run("--json").stdout)["checks"]}
    assert {levels[name] for name in ("dtype", "attention", "disk.room", "dataset", "plan.memory", "plan.time")} == {
        "warn"
    }
    assert levels["python"] == levels["disk.writable"] == "ok"
    assert "the config of preset `demo` cannot be used" in run().stdout.splitlines()[-1]


def test_a_base_directory_that_may_not_be_read_hides_no_other_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr("picollm.data.datasets.Dataset.open", refuse)
    check = run_check("dataset", inspect())
    assert check.level == "warn" and "`/secret`: Permission denied" in check.detail


# -- packages ---------------------------------------------------------------------------------------------------------


def test_every_declared_package_loads() -> None:
    check = machine_checks.check_packages(inspect())
    assert check.level == "ok", check


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("psutil>=1000", "`>=1000` is needed"),
        ("no-such-distribution-here>=1", "no-such-distribution-here is not installed"),
    ],
)
def test_a_missing_or_old_package_blocks(monkeypatch: pytest.MonkeyPatch, declared: str, said: str) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: [declared, 'pytest>=1000; extra == "dev"', "rich"])
    check = machine_checks.check_packages(inspect())
    assert check.level == "block"
    assert said in check.detail and "pytest" not in check.detail
    assert check.fix == f'`pip install "{declared}"`'


def test_a_package_that_does_not_load_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["psutil"])
    monkeypatch.setitem(sys.modules, "psutil", None)
    check = machine_checks.check_packages(inspect())
    assert check.level == "block"
    assert "does not load" in check.detail


def test_a_foreign_owner_of_the_name_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"picollm": ["picollm-cli", "picollm"]})
    check = machine_checks.check_package_conflict(inspect())
    assert check.level == "warn"
    assert check.fix and "pip uninstall picollm`" in check.fix


@pytest.mark.parametrize(
    ("version", "level"), [("2.13.0+cpu", "ok"), ("2.8.0", "block"), ("2.15.0", "block"), (None, "block")]
)
def test_torch_must_be_there_and_in_range(monkeypatch: pytest.MonkeyPatch, version: str | None, level: str) -> None:
    monkeypatch.setattr(torch_facts, "torch_version", lambda: version)
    assert machine_checks.check_torch(inspect()).level == level


def test_a_torch_that_does_not_load_blocks_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, Any]:
        raise HostError("torch does not work in this Python", cause="OSError: no libgomp", hint="install it again")

    monkeypatch.setattr(torch_facts, "run_probe", fail)
    at = Inspection(preset="demo")
    check = run_check("torch", at)
    assert (check.level, check.fix) == ("block", "install it again")
    assert "OSError: no libgomp" in check.detail
    assert run_check("dtype", at).level == "warn"


# -- compute ----------------------------------------------------------------------------------------------------------


def test_a_cpu_is_no_fault() -> None:
    assert machine_checks.check_device(inspect()).level == "info"


def test_a_gpu_that_torch_cannot_use_blocks() -> None:
    check = machine_checks.check_device(inspect(replace(CPU, gpus=(H100,))))
    assert check.level == "block"
    assert "CPU build" in check.detail
    assert check.fix and "CUDA_VISIBLE_DEVICES=" in check.fix


def test_a_gpu_that_torch_uses_is_named_with_its_peak() -> None:
    check = machine_checks.check_device(inspect(replace(CPU, gpus=(H100, H100)), GPU_FACTS))
    assert check.level == "ok"
    assert "2 x NVIDIA H100" in check.detail and "989 TFLOP/s" in check.detail


def check_attention(*sets: str, **attention: Any) -> Check:
    facts = GPU_FACTS | {"attention": GPU_FACTS["attention"] | attention}
    return machine_checks.check_attention(inspect(replace(CPU, gpus=(H100,)), facts, preset="d12", sets=sets))


def test_attention_says_choice_reason_and_the_kernel_that_ran() -> None:
    check = check_attention()
    assert check.level == "ok"
    assert "cudnn: cuDNN's kernel is the fastest on Hopper" in check.detail
    assert "ran: cudnn (`cudnn_generated" in check.detail


def test_attention_warns_when_another_kernel_ran_in_silence() -> None:
    check = check_attention(kernels={"cudnn": {"family": "flash", "name": "pytorch_flash::flash_fwd_kernel"}})
    assert check.level == "warn" and check.fix and "LD_LIBRARY_PATH" in check.fix
    assert "cudnn attention was chosen, but flash" in check.detail


def test_attention_warns_of_an_old_cudnn() -> None:
    old = AttentionDevice("cuda", (9, 0), 91002, installed=frozenset({"flash"})).to_json()
    check = check_attention(device=old, kernels={"flash": {"family": "flash", "name": "flash_fwd_kernel"}})
    assert check.level == "warn" and "cuDNN is 9.10.2" in check.detail and check.fix and "torch 2.11" in check.fix


def test_attention_that_fails_blocks() -> None:
    check = check_attention(kernels={}, broken={"cudnn": "no kernel image is available"})
    assert check.level == "block" and "no kernel image" in check.detail


def test_forced_attention_that_is_not_installed_blocks() -> None:
    check = check_attention("model.attention=fa3")
    assert check.level == "block" and "flash_attn_interface" in check.detail
    assert check.fix and "cudnn" in check.fix


def test_dtype_says_why_and_warns_where_bf16_is_emulated() -> None:
    assert "avx512_bf16" in machine_checks.check_dtype(inspect()).detail
    slow = FACTS | {"bf16": {"works": True, "error": None, "flops_per_s": 8e9}}
    plain = replace(CPU, cpu_flags=frozenset({"avx2"}))
    asked = inspect(plain, slow, sets=["train.dtype=bfloat16"])
    assert machine_checks.check_dtype(asked).level == "warn"
    assert machine_checks.check_dtype(inspect(plain, slow)).detail.startswith("float32")


def test_float16_is_judged_by_its_own_product() -> None:
    old = replace(CPU, gpus=(replace(H100, capability=(7, 5)),))
    broken = GPU_FACTS | {"fp16": {"works": False, "error": "no kernel", "flops_per_s": None}}
    check = machine_checks.check_dtype(inspect(old, broken))
    assert (check.level, check.detail) == ("block", "float16: no kernel")
    assert machine_checks.check_dtype(inspect(CPU, sets=["train.dtype=float16"])).level == "ok"


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    check = machine_checks.check_cores(inspect())
    assert check.level == "warn"
    assert "OMP_NUM_THREADS" in check.detail


# -- memory, disk, run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "available", "level"), [(32, 16, "ok"), (32, 0.2, "warn"), (1, 1, "block")])
def test_memory_levels(total: float, available: float, level: str) -> None:
    machine = replace(CPU, memory_bytes=int(total * 2**30), available_bytes=int(available * 2**30))
    assert machine_checks.check_memory(inspect(machine)).level == level


@pytest.mark.parametrize(("gib", "level"), [(64, "ok"), (8, "warn")])
def test_a_host_too_small_to_save_beside_training_is_a_warning(gib: int, level: str) -> None:
    machine = replace(CPU, memory_bytes=gib * 2**30, available_bytes=gib * 2**30, gpus=(H100,))
    check = machine_checks.check_memory(inspect(machine, GPU_FACTS, preset="d24"))
    assert check.level == level
    assert ("GPUs train on" in check.detail) == (level == "warn")


def test_a_run_that_does_not_fit_blocks() -> None:
    tiny = replace(CPU, memory_bytes=2**28)
    assert run_check("plan.memory", inspect(tiny)).level == "block"
    assert run_check("plan.memory", inspect()).level == "ok"
    long = run_check("plan.time", inspect(preset="d12"))
    assert long.level == "warn" and "days" in long.detail
    priced = run_check("plan.time", inspect(replace(CPU, gpus=(H100,)), GPU_FACTS, preset="d12"))
    assert "at typical prices of 20" in priced.detail


@pytest.mark.parametrize(("free", "level"), [(2**50, "ok"), (2**30, "warn"), (2**28, "block")])
def test_disk_room_levels(monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    monkeypatch.setattr("picollm.hardware.disk_free", lambda _: free)
    assert machine_checks.check_disk_room(inspect()).level == level


def test_writing_leaves_nothing_behind(clean_environment: Path) -> None:
    assert machine_checks.check_disk_writable(inspect()).level == "ok"
    assert list(clean_environment.iterdir()) == []


def test_base_dir_says_where_it_comes_from(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "from PICOLLM_BASE_DIR" in machine_checks.check_base_dir(inspect()).detail
    clean_environment.write_text("a file")
    assert machine_checks.check_base_dir(inspect()).level == "block"
    monkeypatch.delenv("PICOLLM_BASE_DIR")
    assert "from XDG_DATA_HOME" in machine_checks.check_base_dir(inspect()).detail


def test_dataset_is_generated_missing_or_torn(clean_environment: Path) -> None:
    assert run_check("dataset", inspect()).detail == (
        "`toy-world` is generated when needed; `toy-world-chat` is generated when needed"
    )
    missing = run_check("dataset", inspect(sets=["data.dataset=notes"]))
    assert missing.level == "block" and "data import notes" in (missing.fix or "")
    (clean_environment / "datasets" / "notes").mkdir(parents=True)
    torn = run_check("dataset", inspect(sets=["data.dataset=notes"]))
    assert torn.level == "block" and "torn" in torn.detail


def test_dataset_sizes_are_compared(clean_environment: Path) -> None:
    from picollm.data.importer import import_paths

    text = clean_environment / "text"
    text.mkdir(parents=True)
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Document {number} is about the number {number}.\n")
    import_paths("notes", [text])
    at = inspect(sets=["data.dataset=notes"])
    assert "rows of text" in run_check("dataset", at).detail
    assert run_check("disk.room", at).level == "ok"
    with open(next((clean_environment / "datasets" / "notes").glob("*.parquet")), "ab") as file:
        file.write(b"x")
    damaged = run_check("dataset", inspect(sets=["data.dataset=notes"]))
    assert damaged.level == "block" and "damaged" in damaged.detail


def make_run(base: Path) -> RunDir:
    from picollm.config.resolve import resolve
    from picollm.files import write_json

    resolved = resolve(preset="demo")
    made = RunDir(base / "runs" / "mine")
    config = resolved.config.model_dump(mode="json")
    write_json(made.config_path, {"schema": 1, "preset": "demo", "sources": resolved.sources, "config": config})
    return made


def test_a_run_is_checked_with_its_own_config_and_tokenizer(clean_environment: Path) -> None:
    made = make_run(clean_environment)
    result = run("--run", "mine", "--json", "tokenizer", "plan.time")
    tokenizer, time = json.loads(result.stdout)["checks"]
    assert tokenizer["level"] == "info" and "trained by the run" in tokenizer["detail"]
    assert "run `mine`" in time["detail"]
    made.tokenizer.mkdir()
    (made.tokenizer / "tokenizer.json").write_text("{torn")
    assert run_check("tokenizer", inspect(run=made, preset=None)).level == "block"


def test_another_preset_than_the_runs_is_an_error(clean_environment: Path) -> None:
    make_run(clean_environment)
    assert isinstance(run("--run", "mine", "--preset", "d12").exception, ConfigError)
    assert run("--run", "mine", "--preset", "demo", "python").exit_code == 0


def test_a_run_of_another_version_is_reported(clean_environment: Path) -> None:
    made = make_run(clean_environment)
    made.config_path.write_text('{"schema": 99}')
    check = run_check("plan.time", inspect(run=made, preset=None))
    assert check.level == "warn" and "another version" in check.detail
    assert isinstance(run("--run", "mine", "--set", "train.steps=5").exception, IntegrityError)


def test_the_environment_names_the_run_only_where_it_exists(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PICOLLM_RUN", "mine")
    assert "preset `demo`" in run("--json", "plan.time").stdout
    make_run(clean_environment)
    assert "run `mine`" in run("--json", "plan.time").stdout


def test_no_module_of_doctor_imports_torch() -> None:
    code = (
        "import sys; from picollm_cli.checks import *; from picollm import hardware, torch_facts\n"
        "torch_facts.run_probe = lambda: 1 / 0\n"
        "names = set(CHECKS) - {'torch', 'device', 'dtype', 'attention'}\n"
        "for name in names: run_check(name, Inspection(preset='demo'))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_checks_are_values() -> None:
    check = Check("python", "ok", "3.13.0")
    assert check.to_json() == {"id": "python", "level": "ok", "detail": "3.13.0", "fix": None}
