from __future__ import annotations

import json
from pathlib import Path

import pytest

from picollm.errors import IntegrityError, MissingArtifact
from picollm.files import sha256_file, write_json
from picollm.manifest import Problem, list_files, read_manifest, stage_of, verify_manifest, write_manifest
from picollm.run_dir import RunDir


@pytest.fixture
def run(clean_environment: Path) -> RunDir:
    """A run with a finished stage, an evaluation, a report, and everything that a manifest leaves out."""
    run = RunDir(clean_environment / "runs" / "demo")
    write_json(run.config_path, {"schema": 1})
    stage = run.stage("pretrain")
    weights = stage.checkpoints / "step_000010" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    stage.latest.write_text("step_000010\n")
    stage.write_record({"recipe": "a" * 64}, [weights], {})
    write_json(run.eval_stage("sft", "chat").path / "results.json", {})
    write_json(run.path / "report.json", {})
    write_json(run.path / "plots" / "loss.png", {})
    for name in (
        "lock", "pretrain/lock", "pretrain/lock.owner", "pretrain/pid", "pretrain/launcher", "pretrain/STOP",
        "pretrain/log/attempt_1.log", "old/20260101-000000-sft/STAGE.json",
        "pretrain/checkpoints/step_000020.tmp/meta.json",
        ".report.md.77.tmp",
    ):  # fmt: skip
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("transient")
    return run


LISTED = [
    "config.json",
    "eval/sft-chat/results.json",
    "plots/loss.png",
    "pretrain/STAGE.json",
    "pretrain/checkpoints/step_000010/model.safetensors",
    "pretrain/latest",
    "report.json",
]


def test_lists_what_was_made_and_not_who_is_at_work(run: RunDir) -> None:
    manifest = write_manifest(run)
    assert [entry["path"] for entry in manifest["files"]] == LISTED
    assert list_files(run) == LISTED  # the manifest does not list itself
    assert json.loads(run.manifest_path.read_text()) == manifest


def test_entries_are_real_hashes_with_their_origin(run: RunDir) -> None:
    entries = {entry["path"]: entry for entry in write_manifest(run)["files"]}
    name = "pretrain/checkpoints/step_000010/model.safetensors"
    assert entries[name] == {
        "path": name,
        "bytes": 7,
        "sha256": sha256_file(run.path / name),
        "stage": "pretrain",
        "from": {"recipe": "a" * 64},
    }
    assert entries["config.json"]["stage"] == "run"
    assert entries["config.json"]["from"] == {}


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("config.json", "run"),
        ("events.jsonl", "run"),
        ("report.md", "report"),
        ("plots/loss.png", "report"),
        ("tokenizer/tokenizer.json", "tokenizer"),
        ("pretrain/checkpoints/step_000010/meta.json", "pretrain"),
        ("eval/sft-chat/results.json", "eval/sft-chat"),
        ("export/gguf/model.gguf", "export"),
    ],
)
def test_stage_of(path: str, stage: str) -> None:
    assert stage_of(path) == stage


def test_verify_finds_nothing_where_nothing_changed(run: RunDir) -> None:
    write_manifest(run)
    (run.path / "pretrain" / "pid").write_text("another process")
    seen: list[tuple[int, int]] = []
    assert verify_manifest(run, on_progress=lambda done, total: seen.append((done, total))) == []
    assert len(seen) == len(LISTED)
    assert seen[-1][0] == seen[-1][1] == sum((run.path / name).stat().st_size for name in LISTED)


def test_verify_finds_each_kind_of_difference(run: RunDir) -> None:
    write_manifest(run)
    (run.path / "pretrain/checkpoints/step_000010/model.safetensors").write_bytes(b"WEIGHTS")  # same size
    (run.path / "report.json").write_text("longer than it was")
    (run.path / "pretrain/latest").unlink()
    (run.path / "notes.txt").write_text("new")
    problems = verify_manifest(run)
    assert [(p.path, p.kind) for p in problems] == [
        ("notes.txt", "unlisted"),
        ("pretrain/checkpoints/step_000010/model.safetensors", "changed"),
        ("pretrain/latest", "missing"),
        ("report.json", "changed"),
    ]
    assert "sha256" in problems[1].detail
    assert "bytes" in problems[3].detail
    assert all(isinstance(problem, Problem) and problem.path in str(problem) for problem in problems)


def test_a_copy_of_the_folder_verifies(run: RunDir, tmp_path: Path) -> None:
    import shutil

    write_manifest(run)
    copy = shutil.copytree(run.path, tmp_path / "elsewhere" / "another-name")
    assert verify_manifest(RunDir(copy)) == []


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_write_refuses_to_bless_changed_outputs(run: RunDir, damage: str) -> None:
    weights = run.path / "pretrain/checkpoints/step_000010/model.safetensors"
    if damage == "changed":
        weights.write_bytes(b"tampered")
    else:
        weights.unlink()
    with pytest.raises(IntegrityError) as caught:
        write_manifest(run)
    assert "step_000010/model.safetensors" in str(caught.value.cause)
    assert not run.manifest_path.exists()


def test_no_manifest(run: RunDir) -> None:
    with pytest.raises(MissingArtifact) as caught:
        verify_manifest(run)
    assert caught.value.hint == "write it with `picollm manifest write --run demo`"


ENTRY = {"path": "config.json", "bytes": 1, "sha256": "0" * 64, "stage": "run", "from": {}}


@pytest.mark.parametrize(
    "content",
    [
        {"schema": 2, "files": []},
        {"files": []},
        {"schema": 1},
        [],
        {"schema": 1, "files": [{**ENTRY, "path": "../outside"}]},
        {"schema": 1, "files": [{**ENTRY, "path": "/etc/hostname"}]},
        {"schema": 1, "files": [{**ENTRY, "sha256": "short"}]},
        {"schema": 1, "files": ["config.json"]},
    ],
)
def test_foreign_and_malformed_manifests(run: RunDir, content: object) -> None:
    write_json(run.manifest_path, content)
    with pytest.raises(IntegrityError):
        read_manifest(run)
    with pytest.raises(IntegrityError):
        verify_manifest(run)


def test_torn_manifest(run: RunDir) -> None:
    run.manifest_path.write_text('{"schema": 1, "fi')
    with pytest.raises(IntegrityError, match="not readable JSON"):
        verify_manifest(run)


def test_a_part_on_another_disk_is_of_the_run(run: RunDir, tmp_path: Path) -> None:
    """Checkpoints are large: somebody moves them away and links them."""
    write_manifest(run)
    before = list_files(run)
    folder = next(path for path in sorted(run.path.iterdir()) if path.is_dir())
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    (run.path / "run").symlink_to(run.path)
    for one, other in (("this", "that"), ("that", "this")):
        (run.path / one).mkdir()
        (run.path / one / "other").symlink_to(run.path / other)
    assert list_files(run) == before
    assert verify_manifest(run) == []
    (run.path / "best").symlink_to(run.path / "pretrain/checkpoints/step_000010")
    assert list_files(run) == sorted([*before, "best/model.safetensors"])
