"""Import of a user's files: every format, the pinned split, every kind of bad input, and nothing half done."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picollm.data import dataset_writer, importer
from picollm.data.cutting import PIECE_CHARS, WHOLE_FILE_CHARS, cut
from picollm.data.datasets import Dataset
from picollm.data.importer import import_paths
from picollm.data.intake import split_position
from picollm.data.spill import place_of
from picollm.errors import ConfigError, HostError, PicollmError

TEXTS = [f"text number {index}, tä𝄞\n" for index in range(300)]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": f"{index}"}]}
    for index in range(60)
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def text_rows(texts: list[str] = TEXTS, key: str = "text") -> list[dict[str, str]]:
    return [{key: text} for text in texts]


def parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def in_order(text: str) -> tuple[int, int]:
    """Sorts as imports do."""
    return place_of(text.encode())


def refused(*args: Any, **kwargs: Any) -> PicollmError:
    """The error of an import that must leave nothing behind."""
    with pytest.raises(PicollmError) as caught:
        import_paths(*args, **kwargs)
    datasets = Path(os.environ["PICOLLM_BASE_DIR"]) / "datasets"
    assert not datasets.exists() or list(datasets.iterdir()) == []
    return caught.value


# -- formats ----------------------------------------------------------------------------------------------------------


def make_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub/.hidden").mkdir(parents=True)
    for name, text in {
        "b.txt": "b", "A.MD": "a", "sub/c.rst": "c", ".secret.txt": "no", "sub/.hidden/d.txt": "no", "e.png": "no",
    }.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


def test_folder_is_walked_without_hidden_files(tmp_path: Path) -> None:
    summary = import_paths("notes", [make_folder(tmp_path)])
    rows = {split: list(summary.dataset.documents(split)) for split in ("train", "validation")}
    assert sorted(rows["train"] + rows["validation"]) == ["a", "b", "c"]
    assert len(rows["validation"]) == 1
    assert (summary.num_files, summary.num_skipped, summary.documents, summary.characters) == (3, 1, 3, 3)
    assert summary.dataset.source["inputs"] == ["in"]


TABLES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.csv.gz", "a.csv.zst", "a.parquet"]


def table(path: Path, texts: list[str], key: str = "text") -> Path:
    """The texts as a file of the kind its name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return parquet(path, id=list(range(len(texts))), **{key: texts})
    if name.endswith(".csv"):
        lines = io.StringIO()
        csv.writer(lines).writerows([("id", key), *enumerate(texts)])
        data = lines.getvalue().encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in text_rows(texts, key)).encode()
    path.write_bytes(packed(data, path.suffix))
    return path


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.Codec("zstd").compress(data).to_pybytes() if suffix == ".zst" else data


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("field", ["text", "content"])
def test_every_table_format_gives_the_same_documents_in_the_same_order(tmp_path: Path, name: str, field: str) -> None:
    dataset = import_paths("texts", [table(tmp_path / name, TEXTS, field)], field=field).dataset
    validation = set(dataset.documents("validation"))
    assert list(dataset.documents("train")) == sorted((t for t in TEXTS if t not in validation), key=in_order)
    assert validation == {text for text in TEXTS if split_position(text) < 0.05 * 2**64}
    assert 3 <= len(validation) <= 40


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_of_any_encoding(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert import_paths("texts", [tmp_path / "a.parquet"]).documents == 300


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_conversations_go_the_same_way(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet(path, messages=[chat["messages"] for chat in CHATS])
    else:
        jsonl(path, CHATS)
    summary = import_paths("chats", [path])
    assert summary.dataset.kind == "conversations"
    found = [row.to_json() for split in ("train", "validation") for row in summary.dataset.conversations(split)]
    assert sorted(found, key=str) == sorted(CHATS, key=str)
    assert summary.validation >= 1


def test_the_named_field_wins_over_messages(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}"} | chat for index, chat in enumerate(CHATS)]
    assert import_paths("a", [jsonl(tmp_path / "a.jsonl", rows)]).dataset.kind == "text"
    assert import_paths("b", [tmp_path / "a.jsonl"], field="messages").dataset.kind == "conversations"


def test_plain_text_is_normalised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree".encode())
    (tmp_path / "b.txt").write_text("other")
    dataset = import_paths("a", [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.txt"]).dataset
    assert {*dataset.documents("train"), *dataset.documents("validation")} == {"one\ntwo\nthree", "other"}
    assert dataset.rows() == 2  # the file named twice counts once


def test_rejected_rows_are_counted_by_reason(tmp_path: Path) -> None:
    rows = text_rows()
    path = jsonl(tmp_path / "a.jsonl", [*rows[:5], {"text": " \n"}, {"text": "\ud800"}, *rows[5:]])
    with open(path, "a") as file:
        file.write("\n   \n")  # blank lines are no rows
    parquet(tmp_path / "b.parquet", text=["", None, "fine"])
    summary = import_paths("texts", [path, tmp_path / "b.parquet"])
    assert summary.rejected == {"empty": 2, "invalid Unicode": 1, "null": 1}
    assert summary.documents == 301
    silent = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}
    assert import_paths("chats", [jsonl(tmp_path / "c.jsonl", [*CHATS, silent])]).rejected == {"empty message": 1}


# -- cutting ----------------------------------------------------------------------------------------------------------


def test_short_files_stay_whole() -> None:
    text = ("x" * 99 + "\n\n") * 158
    assert len(text) <= WHOLE_FILE_CHARS
    assert list(cut(iter([text]))) == [text]


@pytest.mark.parametrize("chunk", [1, 997, 1 << 20])
def test_long_files_are_cut_at_blank_lines(chunk: int) -> None:
    paragraphs = [f"    paragraph {index} " + "word " * (index % 150) + "end" for index in range(200)]
    text = "\n \n\n".join(paragraphs)
    pieces = list(cut(text[start : start + chunk] for start in range(0, len(text), chunk)))
    assert all(PIECE_CHARS <= len(piece) < PIECE_CHARS + 800 for piece in pieces[:-1])
    assert all(piece.endswith("end") and piece.startswith("    paragraph") for piece in pieces)
    assert "\n \n\n".join(pieces) == text


def test_text_without_blank_lines_is_cut_all_the_same() -> None:
    assert [len(piece) for piece in cut(iter(["x" * 40_000]))] == [16_000, 16_000, 8_000]
    lines = list(cut(iter(["word word\n" * 4_000])))
    assert all(piece.endswith("word") and len(piece) <= WHOLE_FILE_CHARS for piece in lines)
    assert sum(piece.count("word") for piece in lines) == 8_000
    assert all(piece.strip("word ") == "" for piece in cut(iter(["word " * 8_000])))


def test_one_long_file_is_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join(f"{index} " + "tale " * 100 for index in range(100)))
    summary = import_paths("book", [tmp_path / "book.txt"])
    assert 10 <= summary.documents <= 13
    assert summary.validation >= 1


# -- split ------------------------------------------------------------------------------------------------------------


def test_a_document_never_changes_sides(tmp_path: Path) -> None:
    one = import_paths("one", [jsonl(tmp_path / "a.jsonl", text_rows(TEXTS[:200]))]).dataset
    two = import_paths("two", [jsonl(tmp_path / "b.jsonl", text_rows([*TEXTS[100:], *TEXTS, TEXTS[5]]))]).dataset
    sides = {split: {*one.documents(split)} | {*two.documents(split)} for split in ("train", "validation")}
    assert not sides["train"] & sides["validation"]


@pytest.mark.parametrize("count", range(2, 12))
def test_both_splits_have_a_document_however_few_there_are(tmp_path: Path, count: int) -> None:
    texts = [f"{count} {index}" for index in range(count)]
    summary = import_paths("few", [jsonl(tmp_path / "a.jsonl", text_rows(texts))])
    assert 1 <= summary.validation < count
    assert {*summary.dataset.documents("train"), *summary.dataset.documents("validation")} == set(texts)


def test_all_in_validation_is_put_right(tmp_path: Path) -> None:
    texts = [text for text in (f"v{index}" for index in range(500)) if split_position(text) < 0.05 * 2**64][:3]
    summary = import_paths("few", [jsonl(tmp_path / "a.jsonl", text_rows(texts))])
    assert (summary.documents, summary.validation) == (3, 1)
    assert list(summary.dataset.documents("validation")) == [min(texts, key=split_position)]


def test_shards_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "SHARD_BYTES", 1500)
    dataset = import_paths("texts", [jsonl(tmp_path / "a.jsonl", text_rows())]).dataset
    names = [file.name for file in dataset.files if file.split == "train"]
    assert len(names) > 3
    assert names == [f"train-{index:05d}.parquet" for index in range(len(names))]
    assert dataset.verify() == []


# -- names, repetition, force -----------------------------------------------------------------------------------------


def test_the_identical_import_changes_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*text_rows(), {"text": ""}])
    first = import_paths("texts", [path])
    inode = first.dataset.path.stat().st_ino
    again = import_paths("texts", [path])
    assert again.already_there
    assert again.dataset.path.stat().st_ino == inode
    assert (again.documents, again.rejected, again.dataset.sha256) == (300, {"empty": 1}, first.dataset.sha256)


def test_same_files_elsewhere_give_the_same_identity(tmp_path: Path) -> None:
    first = import_paths("texts", [jsonl(tmp_path / "a.jsonl", text_rows())], base=tmp_path / "one").dataset
    (tmp_path / "far").mkdir()
    moved = shutil.copy(tmp_path / "a.jsonl", tmp_path / "far/a.jsonl")
    assert import_paths("texts", [Path(moved)], base=tmp_path / "two").dataset.sha256 == first.sha256


def test_a_taken_name_needs_force_which_keeps_the_old(tmp_path: Path) -> None:
    old = import_paths("texts", [jsonl(tmp_path / "a.jsonl", text_rows())]).dataset
    path = jsonl(tmp_path / "b.jsonl", text_rows(TEXTS[:50]))
    for change in ({}, {"field": "other"}):
        with pytest.raises(ConfigError, match="there is a dataset `texts` already") as caught:
            import_paths("texts", [path], **change)
        assert "--force" in caught.value.hint
    assert Dataset.open("texts").sha256 == old.sha256
    summary = import_paths("texts", [path], force=True)
    assert summary.documents == 50
    assert summary.moved_to is not None
    assert (summary.moved_to / "train-00000.parquet").stat().st_size == old.files[0].bytes


def test_a_damaged_dataset_of_that_name_is_not_the_identical_one(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", text_rows())
    dataset = import_paths("texts", [path]).dataset
    os.truncate(dataset.path / "train-00000.parquet", 5)
    with pytest.raises(ConfigError, match="damaged"):
        import_paths("texts", [path])
    assert import_paths("texts", [path], force=True).dataset.verify() == []


@pytest.mark.parametrize("name", ["toy-world", "toy-world-chat", "../x", ".x", ""])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    assert isinstance(refused(name, [jsonl(tmp_path / "a.jsonl", text_rows())]), ConfigError)


# -- bad input --------------------------------------------------------------------------------------------------------


def bad_parquet_utf8(path: Path) -> None:
    array = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": array}), path)


GOOD = b'{"text": "fine"}\n'
USER, ASSISTANT = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("name", "content", "message", "cause"),
    [
        ("a.txt", b"good\n" + b"x" * 10 + b"\xff", "{path}` is not UTF-8", "byte 15 is 0xff"),
        ("a.txt", b"x" * (1 << 20) + b"\xe4", "{path}` is not UTF-8", "byte 1048576 is 0xe4: unexpected end"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xe4x", "{path}` is not UTF-8", "byte 1048575 is 0xe4"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "{path}` is not UTF-8", "byte 5 is 0xff"),
        ("a.jsonl", GOOD + b'{"text": "\xe4"}\n', "{path}:2` is not UTF-8", "byte 10 is 0xe4"),
        ("a.jsonl", GOOD + b"\n{oops}\n", "{path}:3` is not JSON", "at column 2"),
        ("a.jsonl", GOOD + b'{"text": "cut', "{path}:2` is not JSON", "Unterminated string"),
        ("a.jsonl", b"[" * 100_000, "{path}:1` is not JSON", "recursion"),
        ("a.jsonl", GOOD + b'["text"]\n', "{path}:2` is not a JSON object", "it is a list"),
        ("a.jsonl", GOOD + b'{"body": 1, "id": 2}\n', "{path}:2` has no field `text`", "its fields are: body, id"),
        ("a.jsonl", GOOD + b'{"text": 5}\n', "field `text` of `{path}:2` is not a string", "it is 5"),
        ("a.jsonl", GOOD + b'{"text": null}\n', "field `text` of `{path}:2` is not a string", "it is null"),
        ("a.jsonl.gz", b"not gzip", "cannot unpack `{path}`", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-9], "cannot unpack `{path}`", "end-of-stream"),
        ("a.jsonl.zst", b"not zstd", "cannot unpack `{path}`", "after 0 bytes of text"),
        ("a.txt.gz", gzip.compress(b"some text" * 9, mtime=0)[:20], "cannot unpack `{path}`", "end-of-stream"),
        ("a.csv.gz", gzip.compress(b"text\nfine\n\xe4\n", mtime=0), "{path}` after line `", "is 0xe4"),
        (
            "a.jsonl",
            json.dumps({"messages": [USER, ASSISTANT]}).encode() + b"\n" + json.dumps({"messages": [USER]}).encode(),
            "{path}:2` is not a conversation",
            "the last message is of the user",
        ),
        (
            "a.jsonl",
            GOOD + json.dumps({"messages": [USER, ASSISTANT]}).encode(),
            "{path}:2` is of another kind",
            "{path}:1`, is a document",
        ),
        ("a.parquet", b"PAR1 but no", "{path}` is not readable parquet", None),
        ("a.csv", b"a,b\n1,2\n", "{path}` has no column `text`", "its columns are: a, b"),
        ("a.csv", b'id,text\n1,"two\nlines"\n2,"a"b\n', "{path}:4` is not CSV", "',' expected after '\"'"),
        ("a.csv", b'id,text\n1,fine\n2,"open\n3,x\n', "{path}:3` is not CSV", "unexpected end of data"),
        ("a.csv", b"text\nfine\ncaf\xe9\n", "{path}` after line `", "is 0xe9"),
        ("a.csv", b"", "no document in `{path}`", "there is no row in it"),
        ("a.pdf", b"%PDF", "cannot import `{path}`", "does not end in .txt"),
        ("a.parquet.gz", b"x", "cannot import `{path}`", "does not end in .txt"),
        ("a.jsonl", b'{"text": "a\\u0000b"}\n', "no document in `{path}`", "rejected: 1 NUL bytes"),
        ("a.txt", b"a\0b", "no document in `{path}`", "rejected: 1 NUL bytes"),
        ("a.txt", b"", "no document in `{path}`", "every row was rejected: 1 empty"),
        ("a.jsonl", b"", "no document in `{path}`", "there is no row in it"),
        ("a.txt", b"alone", "only one document in `{path}`", "one is needed for validation"),
        ("a.jsonl", GOOD * 3, "only one document in `{path}`", "the same text again does not count"),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: bytes, message: str, cause: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused("bad", [path])
    assert isinstance(error, ConfigError)
    assert message.format(path=path) in error.message
    assert error.hint
    if cause:
        assert cause.format(path=path) in (error.cause or "")
    assert path.read_bytes() == content


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", body=TEXTS, number=list(range(300)))
    error = refused("bad", [path])
    assert (error.message, error.cause) == (f"`{path}` has no column `text`", "its columns are: body, number")
    error = refused("bad", [path], field="number")
    assert (error.message, error.cause) == (f"column `number` of `{path}` is not text", "its type is int64")
    bad_parquet_utf8(tmp_path / "b.parquet")
    assert f"{tmp_path}/b.parquet:2` is not UTF-8" in refused("bad", [tmp_path / "b.parquet"]).message
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "is not readable parquet" in refused("bad", [path]).message


def test_bad_paths(tmp_path: Path) -> None:
    error = refused("bad", [tmp_path / "nothing"])
    assert (error.message, error.cause) == (f"cannot import `{tmp_path}/nothing`", "it does not exist")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.png").write_bytes(b"x")
    error = refused("bad", [tmp_path / "empty"])
    assert error.message == f"no usable file in `{tmp_path}/empty`"
    assert "none of its 1 files ends in .txt, .md" in error.cause
    assert "neither a file nor a folder" in refused("bad", [Path("/dev/null")]).cause


def test_folder_with_text_and_conversations_is_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    jsonl(folder / "a.jsonl", CHATS)
    (folder / "b.txt").write_text("text")
    error = refused("bad", [folder])
    assert error.message == f"`{folder}/b.txt` is of another kind than what came before"
    assert "a conversation" in error.cause


# -- room, interruption -----------------------------------------------------------------------------------------------


def test_room_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "disk_free", lambda _: 100)
    error = refused("texts", [jsonl(tmp_path / "a.jsonl", text_rows())])
    assert isinstance(error, HostError)
    assert "not enough room" in error.message


@pytest.mark.parametrize("rows", [text_rows(), CHATS])
def test_a_disk_that_fills_up_is_the_hosts_fault(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """A limit on the size of files stands in for the full disk: the same failing write, deep in pyarrow."""
    path = jsonl(tmp_path / "a.jsonl", rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        error = refused("texts", [path])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, HostError)
    assert "cannot write" in error.message


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", text_rows())

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_paths("texts", [path], on_progress=interrupt)
    assert list((Path(os.environ["PICOLLM_BASE_DIR"]) / "datasets").iterdir()) == []


def test_kill_leaves_no_dataset_and_the_next_import_sweeps(tmp_path: Path, clean_environment: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", text_rows(TEXTS * 10))
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom picollm.data.importer import import_paths\n"
        "def pause(done, total):\n    if done > total // 2: print('half', flush=True); time.sleep(60)\n"
        "import_paths('texts', [Path(sys.argv[1])], on_progress=pause)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    datasets = clean_environment / "datasets"
    left = {f".texts.{process.pid}.tmp", f".texts.{process.pid}.scratch.tmp"}
    assert {entry.name for entry in datasets.iterdir()} <= left
    assert {entry.name for entry in datasets.iterdir()} != set()
    assert import_paths("texts", [path]).documents == 300
    assert [entry.name for entry in datasets.iterdir()] == ["texts"]


def test_progress_reaches_the_size_of_the_input(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / "a.jsonl", text_rows()), parquet(tmp_path / "b.parquet", text=TEXTS), tmp_path / "c.txt"]
    files[2].write_text("last")
    seen: list[tuple[int, int]] = []
    import_paths("texts", files, on_progress=lambda done, total: seen.append((done, total)))
    size = sum(file.stat().st_size for file in files)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


# -- real data --------------------------------------------------------------------------------------------------------


def test_the_peps(shared_data: Path) -> None:
    started = time.process_time()
    summary = import_paths("peps", [shared_data / "text/python-peps.parquet"])
    assert time.process_time() - started < 5
    assert (summary.documents, summary.characters, summary.rejected) == (734, 14_294_295, {})
    assert 15 <= summary.validation <= 60
    assert summary.dataset.verify() == []


def test_the_dialogues(shared_data: Path) -> None:
    summary = import_paths("dialogues", [shared_data / "conversations"])
    assert summary.documents == 4399
    assert summary.rejected == {"empty message": 1}
