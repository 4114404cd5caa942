"""Runs by name, stage records, and what counts as started and done."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.files import write_json
from picollm.run_dir import RunDir, StageDir, base_dir, check_name, find_run, list_runs, run_named


def make_run(name: str, age_s: float = 0.0) -> RunDir:
    run = run_named(name)
    write_json(run.config_path, {"schema": 1, "preset": "demo", "sources": {}, "config": {}})
    then = run.config_path.stat().st_mtime - age_s
    os.utime(run.config_path, (then, then))
    return run


@pytest.fixture
def stage(clean_environment: Path) -> StageDir:
    stage = run_named("r").stage("pretrain")
    stage.path.mkdir(parents=True)
    return stage


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "a\n", "a" * 101, "ä"])
def test_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        check_name("run", name)


def test_the_base_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICOLLM_BASE_DIR", "~/here")
    assert base_dir() == tmp_path / "here"
    monkeypatch.delenv("PICOLLM_BASE_DIR")
    assert base_dir() == tmp_path / "share" / "picollm"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert base_dir() == tmp_path / ".local/share/picollm"


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICOLLM_BASE_DIR", "~nobody-of-that-name/x")
    with pytest.raises(HostError, match="no home directory"):
        base_dir()


def test_a_reader_takes_the_named_the_environments_and_else_the_newest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingArtifact, match="no run yet"):
        find_run(None)
    for age_s, name in enumerate(("newest", "middle", "oldest")):
        make_run(name, age_s * 60)
    assert [run.name for run in list_runs()] == ["newest", "middle", "oldest"]
    assert find_run(None).name == "newest"
    monkeypatch.setenv("PICOLLM_RUN", "middle")
    assert find_run(None).name == "middle"
    assert find_run("oldest").name == "oldest"
    with pytest.raises(MissingArtifact) as caught:
        find_run("oldset")
    assert caught.value.hint == "did you mean `--run oldest`?"
    with pytest.raises(MissingArtifact) as caught:
        find_run("zzz")
    assert caught.value.hint == "list them with `picollm runs`"


def test_a_stage_is_done_while_inputs_and_outputs_are_as_recorded(stage: StageDir) -> None:
    output = stage.path / "weights"
    output.write_bytes(b"12345")
    assert not stage.is_done({"recipe": "a"}) and not stage.is_started()
    stage.write_record({"recipe": "a"}, [output], {"loss": 1.0})
    assert stage.is_done({"recipe": "a"}) and stage.is_started()
    assert not stage.is_done({"recipe": "b"})
    output.write_bytes(b"1234")
    assert not stage.is_done({"recipe": "a"})
    output.unlink()
    assert not stage.is_done({"recipe": "a"})


@pytest.mark.parametrize(
    "record",
    [
        {"schema": 1, "inputs": {}, "outputs": {}},
        {"schema": 1, "inputs": {}, "outputs": {"x": {"bytes": 1}}, "result": {}},
        {"schema": 3, "inputs": {}, "outputs": {}, "result": {}},
    ],
)
def test_a_record_that_was_edited_is_refused(stage: StageDir, record: dict[str, object]) -> None:
    write_json(stage.record_path, record)
    with pytest.raises(IntegrityError):
        stage.is_done({})


def test_only_folders_with_files_of_a_checkpoint_are_checkpoints(stage: StageDir) -> None:
    for name in ("step_000010", "step_1234567", "step_000020.tmp", "step_7", "step_000030.damaged"):
        (stage.checkpoints / name).mkdir(parents=True)
        (stage.checkpoints / name / "meta.json").touch()
    (stage.checkpoints / "step_000040").touch()
    junk = stage.checkpoints / "step_999999999"
    junk.mkdir()
    (junk / "notes.txt").touch()
    assert stage.finished_steps() == [10, 1234567]


def test_the_stage_of_an_evaluation_knows_its_run(clean_environment: Path) -> None:
    stage = run_named("r").eval_stage("sft", "chat")
    assert (stage.run.name, stage.name) == ("r", "eval/sft-chat")


def test_a_runtime_file_is_laid_over_the_config(stage: StageDir) -> None:
    with pytest.raises(MissingArtifact, match="has no config"):
        stage.read_config()
    write_json(stage.config_path, {"schema": 1, "recipe": {}, "runtime": {"threads": 1, "ranks": 2}})
    write_json(stage.runtime_path, {"threads": 4})
    assert stage.read_config()["runtime"] == {"threads": 4, "ranks": 2}


def test_the_furthest_finished_stage_is_the_model(stage: StageDir) -> None:
    with pytest.raises(MissingArtifact, match="no trained model"):
        stage.run.latest_trained_stage()
    stage.write_record({}, [], {})
    (stage.run.path / "sft").mkdir()
    assert stage.run.latest_trained_stage() == stage


def test_moving_aside_twice_keeps_both(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picollm.run_dir.time.strftime", lambda _: "20260101-000000")
    moved = []
    for content in ("one", "two"):
        stage.path.mkdir(exist_ok=True)
        (stage.path / "x").write_text(content)
        moved += stage.run.move_to_old(["pretrain", "sft"])
    assert [(path.name, (path / "x").read_text()) for path in moved] == [
        ("20260101-000000-pretrain", "one"),
        ("20260101-000000-pretrain~2", "two"),
    ]
    assert not stage.path.exists()


def test_the_datasets_a_run_was_prepared_with(stage: StageDir) -> None:
    assert stage.run.dataset_hashes() == set()
    data = [{"dataset": "a", "sha256": "1" * 64}]
    write_json(stage.config_path, {"schema": 1, "recipe": {"data": data}, "runtime": {}})
    StageDir(stage.run.tokenizer).path.mkdir()
    StageDir(stage.run.tokenizer).write_record({"dataset a": "2" * 64}, [], {})
    assert stage.run.dataset_hashes() == {"1" * 64, "2" * 64}
