"""`picollm data`: what a user sees on stdout and stderr, JSON shapes and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from picollm.data import toy_datasets
from picollm.data.datasets import Dataset
from picollm.data.registry import TOY_NAMES
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact, PicollmError
from picollm.files import write_json
from picollm.locks import hold_lock
from picollm.run_dir import StageDir, run_named
from picollm_cli import console
from picollm_cli.commands import data

TEXTS = [f"line {index} of a small text" for index in range(40)]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(data.app, [str(argument) for argument in arguments])


def ok(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception or result.output
    return result


def error(kind: type[PicollmError], *arguments: str | Path) -> PicollmError:
    result = run(*arguments)
    assert isinstance(result.exception, kind), result.output
    return result.exception


def last_json(result: Result) -> dict[str, Any]:
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]))
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    reply = [
        {"type": "text", "text": "I see: "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    rows = [
        {"messages": [{"role": "user", "content": f"ask {index}"}, {"role": "assistant", "content": reply}]}
        for index in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("command", ["import", "list", "show", "verify", "remove"])
def test_help_shows_examples(command: str) -> None:
    shown = ok(command, "--help").stdout
    assert "Examples:" in shown
    assert f"picollm data {command}" in shown


def test_the_group_without_a_command_shows_help() -> None:
    assert "import" in run().output


def test_import_prints_a_summary(texts: Path) -> None:
    result = ok("import", "notes", texts)
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith("rejected"))
    assert facts["documents"].strip() == "40"
    assert facts["characters"].strip() == f"{sum(map(len, TEXTS)):,}"
    assert "rejected: empty  1" in result.stdout
    assert (
        "hint: train on it with `picollm speedrun --preset cpu-small --run notes --set data.dataset=notes`"
        in result.stderr
    )
    again = ok("import", "notes", texts)
    assert "nothing changed" in again.stderr


def test_import_json(texts: Path, chats: Path, clean_environment: Path) -> None:
    result = last_json(ok("import", "notes", texts, "--json"))
    assert result["validation"] >= 1
    assert result | {"validation": 0, "sha256": ""} == {
        "name": "notes", "kind": "text", "path": str(clean_environment / "datasets/notes"), "sha256": "",
        "documents": 40, "characters": sum(map(len, TEXTS)), "validation": 0, "duplicates": 0,
        "rejected": {"empty": 1}, "files": 1, "skipped_files": 0, "already_there": False, "moved_to": None,
    }  # fmt: skip
    assert last_json(ok("import", "chats", chats, "--json"))["kind"] == "conversations"


def test_import_force_says_where_the_old_one_is(texts: Path, tmp_path: Path) -> None:
    ok("import", "notes", texts)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert "--force" in error(ConfigError, "import", "notes", tmp_path / "a.txt", tmp_path / "b.txt").hint
    result = ok("import", "notes", tmp_path / "a.txt", tmp_path / "b.txt", "--force")
    assert "datasets/.old/notes-" in result.stderr


def test_import_of_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n{"body": "two"}\n')
    assert error(ConfigError, "import", "a", path).cause == "its fields are: body"
    assert last_json(ok("import", "a", path, "--field", "body", "--json"))["documents"] == 2


def test_import_counts_duplicates_and_short_documents(texts: Path, tmp_path: Path) -> None:
    with open(texts, "a") as file:
        file.write(json.dumps({"text": TEXTS[0]}) + "\n" + json.dumps({"text": "short"}) + "\n")
    shown = ok("import", "notes", texts, "--min-chars", "10").stdout
    facts = {line[:32].strip(): line.split()[-1] for line in shown.splitlines()}
    assert facts["duplicates"] == "1"
    assert "rejected: shorter than 10 characters  1" in shown
    result = last_json(ok("import", "notes", texts, "--min-chars", "10", "--json"))
    assert (result["documents"], result["duplicates"]) == (40, 1)
    assert result["rejected"] == {"empty": 1, "shorter than 10 characters": 1}


def picollm(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "picollm_cli", *arguments], env=environment, capture_output=True, text=True, check=False,
        **options,
    )  # fmt: skip


def test_import_of_standard_input(texts: Path) -> None:
    done = picollm("data", "import", "notes", "-", "--json", input=texts.read_text())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 40
    done = picollm("data", "import", "bad", "-", input='{"text": "a"}\n{"text": \n')
    assert done.returncode == 2
    assert done.stderr.startswith("error: `<stdin>:2` is not JSON")


def make_run(name: str, dataset: str, sha256: str) -> StageDir:
    """As much of a run as says what it was trained on."""
    run = run_named(name)
    write_json(run.config_path, {"schema": 1, "preset": "demo", "sources": {}, "config": {}})
    stage = run.stage("pretrain")
    recipe = {"data": [{"dataset": dataset, "sha256": sha256, "weight": 1.0}]}
    write_json(stage.config_path, {"schema": 1, "recipe": recipe, "runtime": {}})
    return stage


def test_remove_takes_the_dataset_and_its_token_caches(texts: Path, clean_environment: Path) -> None:
    ok("import", "notes", texts)
    ok("import", "notes-2", texts)
    caches = clean_environment / "cache/tokens"
    for name in ("notes-0123456789ab-0123456789ab", "notes-2-0123456789ab-0123456789ab"):
        (caches / name).mkdir(parents=True)
        (caches / name / "index.json").write_text("{}")
    expected = error(ConfigError, "remove", "notes")
    assert "`notes` and 1 token cache of it" in expected.message
    assert expected.hint == "repeat the command with `--yes`"
    result = last_json(ok("remove", "notes", "--yes", "--json"))
    assert result["removed"] is True
    assert result["bytes"] > 500
    assert [path.name for path in (clean_environment / "datasets").iterdir()] == ["notes-2"]
    assert [path.name for path in caches.iterdir()] == ["notes-2-0123456789ab-0123456789ab"]
    assert error(MissingArtifact, "remove", "notes").message == "there is no dataset `notes`"
    assert "removed `notes-2`" in ok("remove", "notes-2", "--yes").stdout


def test_remove_asks_and_takes_no_for_an_answer(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("import", "notes", texts)
    monkeypatch.setattr(
        console.Output, "confirm", lambda self, question, *, yes: "delete dataset `notes`" not in question
    )
    assert "nothing was removed" in ok("remove", "notes").stdout
    assert Dataset.open("notes").verify() == []


def test_remove_tells_which_runs_were_trained_on_it(texts: Path) -> None:
    ok("import", "notes", texts)
    make_run("first", "notes", Dataset.open("notes").sha256)
    make_run("other", "notes", "0" * 64)
    result = ok("remove", "notes", "--yes")
    assert "warning: trained on it, and cannot go on training without it: `first`\n" in result.stderr


def test_remove_refuses_while_a_stage_or_a_download_runs(texts: Path) -> None:
    ok("import", "notes", texts)
    dataset = Dataset.open("notes")
    stage = make_run("first", "notes", dataset.sha256)
    for lock in (stage.lock_path, dataset.path / ".lock"):
        with hold_lock(lock, "it"):
            assert f"process {os.getpid()} holds" in error(HostError, "remove", "notes", "--yes").cause
    assert dataset.verify() == []
    ok("remove", "notes", "--yes")


def test_torn_datasets_can_be_removed(clean_environment: Path) -> None:
    (clean_environment / "datasets/torn").mkdir(parents=True)
    make_run("first", "torn", "0" * 64)
    result = ok("remove", "torn", "--yes")
    assert "`first`" in result.stderr
    assert list((clean_environment / "datasets").iterdir()) == []


def test_remove_of_a_link_leaves_what_it_leads_to(texts: Path, clean_environment: Path, tmp_path: Path) -> None:
    ok("import", "notes", texts)
    folder = clean_environment / "datasets/notes"
    moved = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(moved)
    ok("remove", "notes", "--yes")
    assert not folder.is_symlink()
    assert (moved / "dataset.json").exists()


def test_list(texts: Path, chats: Path) -> None:
    empty = ok("list")
    assert empty.stdout == ""
    assert "picollm data import NAME PATH…" in empty.stderr
    ok("import", "notes", texts)
    ok("import", "chats", chats)
    lines = ok("list").stdout.splitlines()
    assert lines[0].split()[:4] == ["name", "kind", "train", "validation"]
    words = [line.split() for line in lines[1:]]
    assert [(name, kind, int(train) + int(validation)) for name, kind, train, validation, *_ in words] == [
        ("chats", "conversations", 9),
        ("notes", "text", 40),
    ]
    listed = last_json(ok("list", "--json"))
    assert [entry["name"] for entry in listed["datasets"]] == ["chats", "notes"]
    assert sum(split["rows"] for split in listed["datasets"][1]["splits"].values()) == 40


def test_list_goes_on_after_a_torn_dataset(texts: Path, clean_environment: Path) -> None:
    ok("import", "notes", texts)
    (clean_environment / "datasets/torn").mkdir()
    result = ok("list")
    assert "warning: dataset `torn` is torn" in result.stderr
    assert "notes" in result.stdout
    assert last_json(ok("list", "--json"))["torn"][0]["error"]["exit_code"] == 5


def test_show_facts_and_rows(texts: Path) -> None:
    ok("import", "notes", texts)
    shown = ok("show", "notes", "--rows", "2").stdout
    dataset = Dataset.open("notes")
    assert dataset.sha256 in shown
    assert shown.count("-- train ") == 2
    assert dataset.documents("train")[1] in shown
    result = last_json(ok("show", "notes", "--split", "validation", "--rows", "1", "--json"))
    assert result["rows"] == dataset.first_rows("validation", 1)
    assert result["split"] == "validation"
    assert run("show", "notes", "--split", "test").exit_code == 2


def test_show_conversations_with_their_tool_block(chats: Path) -> None:
    ok("import", "chats", chats)
    shown = ok("show", "chats", "--rows", "1").stdout
    assert "user: ask " in shown
    assert "assistant: I see: [python: 1+1][python_output: 2]" in shown


def test_show_shortens_and_never_sends_control_codes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\x1b[31m" + "x" * 5000)
    ok("import", "red", tmp_path / "a.txt", tmp_path / "b.txt")
    shown = ok("show", "red").stdout
    assert "\x1b" not in shown
    assert "\ufffd[31m" in shown
    assert "… (5,006 characters)" in shown


def test_show_makes_the_toy_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_datasets, "TOY_SIZES", dict.fromkeys(TOY_NAMES, (50, 10)))
    assert error(MissingArtifact, "verify", "toy-world").hint == "make it with `picollm data show toy-world`"
    assert "50 documents" in ok("show", "toy-world", "--rows", "1").stdout
    assert "as recorded" in ok("verify", "toy-world").stdout


def test_verify(texts: Path, clean_environment: Path) -> None:
    ok("import", "notes", texts)
    assert last_json(ok("verify", "notes", "--json"))["ok"] is True
    os.truncate(clean_environment / "datasets/notes/train-00000.parquet", 3)
    (clean_environment / "datasets/notes/validation-00000.parquet").unlink()
    found = error(IntegrityError, "verify", "notes")
    assert found.message == "dataset `notes` is damaged: 2 of 2 files"
    assert "train-00000.parquet: 3 bytes" in found.cause
    assert "validation-00000.parquet: missing" in found.cause
    assert found.hint == "make it again with `picollm data import notes PATH… --force`"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["data", "import", "notes", "nothing.txt"], 2, "cannot import `nothing.txt`"),
        (["data", "import", "notes", "bad.txt"], 2, "`bad.txt` is not UTF-8"),
        (["data", "import", "notes", "bad.jsonl"], 2, "`bad.jsonl:2` is not JSON"),
        (["data", "show", "nothing"], 4, "there is no dataset `nothing`"),
        (["data", "verify", "torn"], 5, "dataset `torn` is torn"),
    ],
)
def test_exit_codes_of_the_real_command(
    tmp_path: Path, clean_environment: Path, arguments: list[str], code: int, expected: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n')
    (clean_environment / "datasets/torn").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[2])}
    command = [sys.executable, "-m", "picollm_cli", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {expected}")
    assert "\nhint: " in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
