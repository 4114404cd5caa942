"""A stage's config on another machine than the one that it was first prepared on."""

from __future__ import annotations

from pathlib import Path

import pytest

from picollm import hardware
from picollm.config.resolve import resolve
from picollm.errors import ConfigError
from picollm.events import read_all
from picollm.files import sha256_json, write_json
from picollm.hardware import Gpu, Machine
from picollm.plan import pretrain_recipe
from picollm.run_dir import RunDir
from picollm_cli.launch_line import Launch
from picollm_cli.prepare import Prepared, plan_of
from picollm_cli.prepare_stage import _store_training

GIB = 2**30


def machine(*capability: int) -> Machine:
    gpus = (Gpu(0, "GPU", 80 * GIB, (capability[0], capability[1]), "570"),) if capability else ()
    return Machine("Linux", "cpu", frozenset({"avx2"}), 8, 8, 64 * GIB, 60 * GIB, gpus)


def prepare(monkeypatch: pytest.MonkeyPatch, run: RunDir, here: Machine, *sets: str) -> dict:
    """The `config.json` of pretraining after preparing it on a machine."""
    monkeypatch.setattr(hardware, "detect", lambda: here)
    found = resolve(preset="d24", sets=["data.dataset=toy-world", *sets])
    recipe = pretrain_recipe(found.config, here, tokenizer_vocab=32768, tokenizer_sha256="t" * 64, data=())
    prepared = Prepared(run, found.preset, found.config, found.sources, new=False)
    return _store_training(prepared, run.stage("pretrain"), recipe, Launch()).read_config()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "runs" / "r")
    found.path.mkdir(parents=True)
    return found


def test_precision_stays_as_first_decided(monkeypatch, run):
    first = prepare(monkeypatch, run, machine(9, 0))["recipe"]
    assert (first["dtype"], first["fp8"]) == ("bfloat16", True)
    assert prepare(monkeypatch, run, machine(8, 9))["recipe"] == first
    assert prepare(monkeypatch, run, machine(9, 0), "train.fp8=true", "train.dtype=bfloat16")["recipe"] == first


def test_fp8_is_never_dropped_in_silence(monkeypatch, run):
    prepare(monkeypatch, run, machine(9, 0))
    with pytest.raises(ConfigError, match=r"compute capability is 8\.0|not possible on this GPU") as caught:
        prepare(monkeypatch, run, machine(8, 0))
    assert "train.fp8=false" in str(caught.value.hint)


def test_fp8_does_not_appear_on_a_better_machine(monkeypatch, run):
    first = prepare(monkeypatch, run, machine(8, 0))["recipe"]
    assert not first["fp8"] and "no 8-bit tensor cores" in first["fp8_reason"]
    assert prepare(monkeypatch, run, machine(9, 0))["recipe"] == first
    assert prepare(monkeypatch, run, machine(9, 0), "train.fp8=true")["recipe"]["fp8"]


def test_runtime_follows_the_machine(monkeypatch, run):
    large = prepare(monkeypatch, run, machine(9, 0))["runtime"]
    small = prepare(monkeypatch, run, machine(8, 9), "train.checkpoint_minutes=3")["runtime"]
    assert (large["checkpoint_minutes"], small["checkpoint_minutes"]) == (15, 3)
    assert large["device_batch_size"] == small["device_batch_size"] > 1 and not large["activation_checkpointing"]


def test_a_back_off_lasts_until_another_size_is_asked_for(monkeypatch, run):
    stage = run.stage("pretrain")
    rows = prepare(monkeypatch, run, machine(9, 0))["runtime"]["device_batch_size"]
    write_json(stage.runtime_path, {"device_batch_size": rows // 2, "reason": "out of memory"})
    before = stage.config_path.read_bytes()
    assert prepare(monkeypatch, run, machine(9, 0))["runtime"]["device_batch_size"] == rows // 2
    assert stage.config_path.read_bytes() == before and not run.events_path.exists()
    asked = f"train.device_batch_size={rows // 4}"
    assert prepare(monkeypatch, run, machine(9, 0), asked)["runtime"]["device_batch_size"] == rows // 4
    assert not stage.runtime_path.exists()
    assert [event["text"] for event in read_all(run.events_path)] == [
        f"runtime device_batch_size: {rows} -> {rows // 4}"
    ]


def test_the_plan_of_a_run_that_moved_shows_what_it_keeps(monkeypatch, run):
    stored = prepare(monkeypatch, run, machine(9, 0))["recipe"]
    found = resolve(preset="d24", sets=["data.dataset=toy-world"])
    monkeypatch.setattr(hardware, "detect", lambda: machine(8, 9))
    plan = plan_of(Prepared(run, found.preset, found.config, found.sources, new=False)).to_json()
    assert plan["fp8"] == {"value": True, "reason": stored["fp8_reason"]}
    other = Prepared(RunDir(run.path.parent / "other"), found.preset, found.config, found.sources, new=True)
    assert plan_of(other).to_json()["fp8"]["value"] is False


def test_a_finished_stage_keeps_its_config_wherever_it_is_asked_for_again(monkeypatch, run):
    stage = run.stage("pretrain")
    recipe = prepare(monkeypatch, run, machine(9, 0))["recipe"]
    stage.write_record({"recipe": sha256_json(recipe)}, [stage.config_path], {})
    before = stage.config_path.read_bytes()
    prepare(monkeypatch, run, machine(8, 9), "train.checkpoint_minutes=3")
    assert stage.config_path.read_bytes() == before and not run.events_path.exists()
