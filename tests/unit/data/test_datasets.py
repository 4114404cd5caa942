"""Datasets on disk: opened, read by row, damaged and noticed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from picollm.data import dataset_writer, documents
from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset, list_datasets
from picollm.data.toy_datasets import ensure
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact

TEXTS = [f"document {index} " + "tä𝄞" * (index % 7) for index in range(2500)]
CHAT = Conversation.from_json(
    {"messages": [{"role": "user", "content": "hi\u2028 there"}, {"role": "assistant", "content": "hello"}]}
)


def write(name: str = "words", texts: list[str] = TEXTS, validation: int = 100) -> Dataset:
    with DatasetWriter(name) as writer:
        writer.start("text")
        for index, text in enumerate(texts):
            writer.add("validation" if index < validation else "train", text)
        return writer.publish({"from": "a test"})[0]


def write_chat() -> Dataset:
    with DatasetWriter("chat") as writer:
        writer.start("conversations")
        writer.add("train", CHAT)
        writer.add("validation", CHAT)
        return writer.publish({"from": "a test"})[0]


def edit_record(dataset: Dataset, **changes: object) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_file(dataset: Dataset, **changes: object) -> None:
    first, *others = (file.to_json() for file in dataset.files)
    edit_record(dataset, files=[first | changes, *others])


# -- reading ----------------------------------------------------------------------------------------------------------


def test_record_counts_and_identity(clean_environment: Path) -> None:
    dataset = write()
    record = (clean_environment / "datasets/words/dataset.json").read_bytes()
    assert (dataset.rows("train"), dataset.rows("validation"), dataset.rows()) == (2400, 100, 2500)
    assert dataset.chars() == sum(map(len, TEXTS))
    assert dataset.bytes() == sum(path.stat().st_size for path in dataset.path.glob("*.parquet"))
    assert dataset.sha256 == hashlib.sha256(record).hexdigest()
    assert json.loads(record)["files"][0]["name"] == "train-00000.parquet"
    assert str(clean_environment) not in record.decode()


def test_same_rows_give_the_same_bytes() -> None:
    assert write("one").files == write("two").files


def test_documents_by_row_slice_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "ROW_GROUP_ROWS", 64)
    monkeypatch.setattr(dataset_writer, "SHARD_BYTES", 20_000)
    dataset = write()
    train = dataset.documents("train")
    assert sum(file.split == "train" for file in dataset.files) > 2
    assert len(train) == 2400
    assert list(train) == TEXTS[100:]
    order = [0, 2399, 1200, 1, 63, 64, -1, 700, 0]
    assert [train[row] for row in order] == [TEXTS[100:][row] for row in order]
    assert train[10:13] == TEXTS[110:113]
    for row in (2400, -2401):
        with pytest.raises(IndexError):
            train[row]


def test_only_a_few_row_groups_stay_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "ROW_GROUP_ROWS", 10)
    train = write().documents("train")
    for row in range(0, 2400, 10):
        assert train[row] == TEXTS[100 + row]
    assert len(train._cache) == documents.CACHED_ROW_GROUPS


def test_only_a_few_files_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "SHARD_BYTES", 2000)
    monkeypatch.setattr(documents, "OPEN_FILES", 2)
    dataset = write()
    assert len(dataset.of("train")) > 10
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = dataset.documents("train")
    assert list(found) == TEXTS[100:] and [found[i] for i in range(2399, -1, -97)] == TEXTS[:99:-97]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_row_group_is_closed_by_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "ROW_GROUP_BYTES", 1000)
    train = write().documents("train")
    assert len(train._groups) > 10
    assert list(train) == TEXTS[100:]


def test_conversations_survive_odd_line_separators() -> None:
    dataset = write_chat()
    assert dataset.conversations("train") == dataset.conversations("validation") == [CHAT]
    assert dataset.first_rows("train", 5) == [CHAT.to_json()]


def test_the_wrong_kind_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError) as caught:
        write_chat().documents("train")
    assert caught.value.cause == "it holds conversations, not text"
    with pytest.raises(ConfigError) as caught:
        write().conversations("train")
    assert "--set data.dataset=words" in caught.value.hint


# -- what is not there, or not as recorded ----------------------------------------------------------------------------


def test_missing_names_the_nearest_and_the_command() -> None:
    write()
    with pytest.raises(MissingArtifact) as caught:
        Dataset.open("word")
    assert "did you mean `words`?" in caught.value.hint
    assert "picollm data import word PATH…" in caught.value.hint
    with pytest.raises(MissingArtifact) as caught:
        Dataset.open("toy-world")
    assert caught.value.hint == "make it with `picollm data show toy-world`"


def test_a_name_cannot_leave_the_folder() -> None:
    with pytest.raises(ConfigError):
        Dataset.open("../runs")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda dataset: (dataset.path / "dataset.json").unlink(), "does not exist"),
        (lambda dataset: (dataset.path / "dataset.json").write_bytes(b'{"schema": 1, '), "not readable JSON"),
        (lambda dataset: edit_record(dataset, schema=2), "schema is not 1"),
        (lambda dataset: edit_record(dataset, kind="images"), "kind is 'images'"),
        (lambda dataset: edit_record(dataset, files=[{"name": "x"}]), "missing"),
        (
            lambda dataset: edit_record(
                dataset, files=[{"name": "../x", "split": "train", "rows": 1, "bytes": 1, "chars": 1, "sha256": ""}]
            ),
            r"names a file `\.\./x`",
        ),
        (lambda dataset: (dataset.path / "dataset.json").write_text("[]"), "schema is not 1"),
        (lambda dataset: edit_record(dataset, source="hub"), "must be objects"),
        (lambda dataset: edit_file(dataset, bytes="1"), "are no counts"),
        (lambda dataset: edit_file(dataset, rows=-1), "are no counts"),
        (lambda dataset: edit_file(dataset, bytes=None), "are no counts"),
        (lambda dataset: edit_file(dataset, sha256=None), "is no text"),
        (lambda dataset: edit_file(dataset, name="validation-00000.parquet"), "names a file twice"),
    ],
)
def test_a_torn_record_is_an_integrity_error(damage, reason: str) -> None:
    dataset = write()
    damage(dataset)
    with pytest.raises(IntegrityError) as caught:
        Dataset.open("words")
    assert caught.value.cause is not None
    assert re.search(reason, caught.value.cause)
    assert caught.value.hint == "make it again with `picollm data import words PATH… --force`"


def test_a_cut_shard_is_named_before_reading() -> None:
    dataset = write()
    shard = dataset.path / "train-00000.parquet"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet.*damaged") as caught:
        dataset.documents("train")
    assert "its record says" in caught.value.cause
    assert len(dataset.documents("validation")) == 100
    assert dataset.verify()[0].startswith("train-00000.parquet: ")
    shard.unlink()
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet"):
        dataset.documents("train")
    assert dataset.verify() == ["train-00000.parquet: missing"]


def test_a_flipped_bit_of_the_same_size_is_never_read_as_text() -> None:
    dataset = write()
    shard = dataset.path / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet"):
        list(dataset.documents("train"))
    assert dataset.verify() == ["train-00000.parquet: content changed (sha256 differs)"]


def test_a_foreign_parquet_of_the_same_size_is_refused() -> None:
    dataset = write()
    shard = dataset.path / "train-00000.parquet"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(IntegrityError, match=r"train-00000\.parquet"):
        dataset.documents("train")[0]


def test_changed_conversations_are_refused() -> None:
    dataset = write_chat()
    shard = dataset.path / "train-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"hello", b"hallo"))
    with pytest.raises(IntegrityError) as caught:
        dataset.conversations("train")
    assert caught.value.cause == "its sha256 is not the recorded one"


def test_verify_reports_progress_in_bytes() -> None:
    dataset = write()
    seen: list[tuple[int, int]] = []
    assert dataset.verify(lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (dataset.bytes(), dataset.bytes())


def test_list_leaves_out_what_is_torn_and_what_is_hidden(clean_environment: Path) -> None:
    assert list_datasets() == []
    write("b")
    write("a")
    (clean_environment / "datasets/torn").mkdir()
    (clean_environment / "datasets/.c.1.tmp").mkdir()
    problems: list[str] = []
    found = list_datasets(on_problem=lambda name, error: problems.append(name))
    assert [dataset.name for dataset in found] == ["a", "b"]
    assert problems == ["torn"]


def test_ensure_opens_other_names() -> None:
    write()
    assert ensure("words").name == "words"
    with pytest.raises(MissingArtifact):
        ensure("nothing")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_interrupted_writer(clean_environment: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter("words") as writer:
        writer.start("text")
        writer.add("train", "x")
        assert [path.name for path in (clean_environment / "datasets").iterdir()] == [f".words.{os.getpid()}.tmp"]
        raise KeyboardInterrupt
    assert list((clean_environment / "datasets").iterdir()) == []


def test_leftovers_of_dead_processes_are_swept(clean_environment: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid(), os.getpid()):
        (clean_environment / f"datasets/.x.{pid}.tmp").mkdir(parents=True)
    (clean_environment / "datasets/.unrelated.tmp").mkdir()
    write()
    left = {path.name for path in (clean_environment / "datasets").iterdir()}
    assert left == {"words", f".x.{os.getppid()}.tmp", ".unrelated.tmp"}


def test_a_taken_name_is_kept_or_moved() -> None:
    old = write(texts=TEXTS[:200])
    with pytest.raises(ConfigError, match="already"):
        write()
    assert Dataset.open("words").sha256 == old.sha256
    for _ in range(2):
        with DatasetWriter("words") as writer:
            writer.start("text")
            writer.add("train", "new")
            _, moved = writer.publish({"from": "another test"}, existing="move")
        assert moved is not None
        assert moved.parent.name == ".old"
    assert len(list(moved.parent.iterdir())) == 2
    assert list(Dataset.open("words").documents("train")) == ["new"]


def test_a_base_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError), DatasetWriter("words", tmp_path / "file"):
        pass
