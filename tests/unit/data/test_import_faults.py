"""Imports of what is not a good file: pipes, links, giants, crowds, and things that change or vanish."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picollm.data import intake, spill
from picollm.data.importer import import_paths
from picollm.data.sources import STDIN
from picollm.errors import ConfigError, HostError, PicollmError

GOOD = [f"a good text, number {index}" for index in range(20)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def refused(*paths: Path, **kwargs: Any) -> PicollmError:
    with pytest.raises(PicollmError) as caught:
        import_paths("bad", list(paths), **kwargs)
    datasets = Path(os.environ["PICOLLM_BASE_DIR"]) / "datasets"
    assert not datasets.exists() or list(datasets.iterdir()) == []
    return caught.value


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# -- standard input ---------------------------------------------------------------------------------------------------


def test_standard_input_of_either_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "a.jsonl", GOOD).read_bytes()
    pipe_in(monkeypatch, b"\xef\xbb\xbf" + data)
    one = import_paths("one", [STDIN, STDIN])
    pipe_in(monkeypatch, ("word " * 5000 + "\n").encode())
    two = import_paths("two", [STDIN])
    assert one.documents == 20
    assert one.dataset.source["inputs"] == ["stdin.jsonl"]
    assert two.documents > 1
    assert two.dataset.source["inputs"] == ["stdin.txt"]
    pipe_in(monkeypatch, b"\xef\xbb\xbf" + data)
    assert import_paths("one", [STDIN]).already_there


def test_faults_in_standard_input_name_no_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe_in(monkeypatch, b'{"text": "a"}\n{"text": \n')
    assert refused(STDIN).message == "`<stdin>:2` is not JSON"
    pipe_in(monkeypatch, b"caf\xe9")
    assert refused(STDIN).message == "`<stdin>` is not UTF-8"
    pipe_in(monkeypatch, b"")
    assert refused(STDIN).message == "no document in `-`"
    pipe_in(monkeypatch, gzip.compress(b"text"))
    error = refused(STDIN)
    assert (error.message, error.cause) == (
        "cannot import standard input", "it is gzip, and only text and JSON lines can be piped in",
    )  # fmt: skip
    assert "zcat" in (error.hint or "")
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(STDIN).cause == "it is closed"


# -- things that are no files -----------------------------------------------------------------------------------------


def test_pipes_sockets_and_devices_are_refused_without_reading_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
        for path in (tmp_path / "pipe.jsonl", tmp_path / "socket.jsonl", Path("/dev/zero")):
            error = refused(path)
            assert error.cause == "it is neither a file nor a folder"
            assert "data import NAME -" in (error.hint or "")
    jsonl(tmp_path / "a.jsonl", GOOD)
    summary = import_paths("texts", [tmp_path])
    assert (summary.num_files, summary.num_skipped, summary.documents) == (1, 2, 20)


def test_links_are_followed_to_files_but_never_round_and_round(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    jsonl(tmp_path / "real.jsonl", GOOD)
    (folder / "a.jsonl").symlink_to(tmp_path / "real.jsonl")
    (folder / "again.jsonl").symlink_to(tmp_path / "real.jsonl")
    (folder / "sub/up").symlink_to(folder)
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "nowhere.jsonl").symlink_to(folder / "nothing")
    for name in ("loop.jsonl", "nowhere.jsonl"):
        assert refused(folder / name).cause == "it is a link that leads nowhere"
    summary = import_paths("texts", [folder])
    assert (summary.num_files, summary.num_skipped, summary.documents, summary.duplicates) == (1, 3, 20, 0)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "memory.txt").symlink_to("/proc/self/mem")  # its first page is nobody's, not even root's
    error = refused(tmp_path / "memory.txt")
    assert isinstance(error, ConfigError)
    assert (error.message, error.cause) == (f"cannot read `{tmp_path}/memory.txt`", "Input/output error")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that every user may enter and write, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("what", ["in/a.jsonl", "in"])
def test_what_belongs_to_somebody_else(open_to_all: Path, what: str) -> None:
    (open_to_all / "in").mkdir()
    jsonl(open_to_all / "in/a.jsonl", GOOD)
    (open_to_all / what).chmod(0)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom picollm.data.importer import import_paths\nos.seteuid(65534)\n"
        "try:\n    import_paths('bad', [Path(sys.argv[1])], base=Path(sys.argv[2]), processes=1)\n"
        "except Exception as error:\n    print(repr(error), error.cause)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, open_to_all / "in", open_to_all / "base"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, check=True,
    )  # fmt: skip
    assert done.stdout == f"ConfigError('cannot read `{open_to_all / what}`') Permission denied\n"


def test_a_file_that_grows_or_vanishes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", GOOD)
    read = intake.read_records

    def grow(*args: Any) -> Any:
        with open(path, "a") as file:
            file.write('{"text": "more"}\n')
        return read(*args)

    monkeypatch.setattr(intake, "read_records", grow)
    assert refused(path).message == f"`{path}` changed while it was read"
    monkeypatch.setattr(intake, "read_records", lambda *args: (path.unlink(), read(*args))[1])
    error = refused(path)
    assert (error.message, error.cause) == (f"cannot read `{path}`", "No such file or directory")


def test_a_scratch_folder_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody cleans up while an import runs; what is left must not be taken for everything."""
    from picollm.data import importer

    read = importer.read_all

    def lose(folder: Path, *args: Any) -> Any:
        tally = read(folder, *args)
        for path in folder.iterdir():
            path.unlink()
        return tally

    monkeypatch.setattr(importer, "read_all", lose)
    error = refused(jsonl(tmp_path / "a.jsonl", GOOD))
    assert isinstance(error, HostError)
    assert error.cause == "20 rows were put there, 0 came back"


# -- many, large and empty --------------------------------------------------------------------------------------------


def test_ten_thousand_tiny_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for part in range(10):
        (folder / str(part)).mkdir(parents=True)
        for index in range(1000):
            (folder / f"{part}/{index}.txt").write_text(f"tiny {part} {index % 999}")
    summary = import_paths("tiny", [folder], processes=2)
    assert (summary.num_files, summary.documents, summary.duplicates) == (10_000, 9_990, 10)


def test_empty_files_among_good_ones(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "d.parquet")
    jsonl(tmp_path / "e.jsonl", GOOD)
    summary = import_paths("texts", [tmp_path])
    assert (summary.num_files, summary.documents, summary.rejected) == (5, 20, {"empty": 1})


def test_short_documents_are_counted(tmp_path: Path) -> None:
    summary = import_paths("texts", [jsonl(tmp_path / "a.jsonl", ["x" * size for size in range(1, 31)])], min_chars=11)
    assert (summary.documents, summary.rejected) == (20, {"shorter than 11 characters": 10})
    with pytest.raises(ConfigError, match="there is a dataset `texts` already"):
        import_paths("texts", [tmp_path / "a.jsonl"], min_chars=12)
    assert refused_again(tmp_path, min_chars=-1).message == "min_chars = -1 is negative"


def refused_again(tmp_path: Path, **kwargs: Any) -> PicollmError:
    with pytest.raises(PicollmError) as caught:
        import_paths("other", [tmp_path / "a.jsonl"], **kwargs)
    return caught.value


def test_cells_of_csv_with_commas_lines_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,text,more\r\n1,"one, two\r\nthree ""four""",x\r\n\r\n2\r\n3,,y\r\n4,plain\r\n5,\xc3\xa4,z\r\n'
    )
    summary = import_paths("texts", [tmp_path / "a.csv"])
    found = {*summary.dataset.documents("train"), *summary.dataset.documents("validation")}
    assert found == {'one, two\r\nthree "four"', "plain", "ä"}
    assert summary.rejected == {"empty": 1, "too few cells": 1}


GIANT = """
import json, resource, sys
from pathlib import Path
from picollm.data.importer import import_paths
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
done = import_paths("giant", [Path(sys.argv[1])], processes=1)
print(json.dumps([done.documents, done.characters, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def import_giant(path: Path) -> tuple[int, int, int]:
    """Documents, characters, and the MiB that the import took at its peak."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", GIANT, path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    documents, characters, before, after = json.loads(done.stdout)
    return documents, characters, (after - before) // 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "txt"])
def test_a_document_of_100_mb_on_one_line(tmp_path: Path, kind: str) -> None:
    """In one piece where a row is a document; plain text without a line end is cut."""
    size, path = 100_000_000, tmp_path / f"a.{kind}"
    giant = "tale " * (size // 5)
    if kind == "jsonl":
        jsonl(path, [giant, "small"])
    elif kind == "parquet":
        pq.write_table(pa.table({"text": ["small", giant]}), path)
    elif kind == "csv":
        path.write_text(f"text\n{giant}\nsmall\n")
    else:
        path.write_text(giant + "end")
    documents, characters, peak = import_giant(path)
    if kind == "txt":
        assert documents == 2  # the same words again and again, and the rest
        assert peak < 100
    else:
        assert (documents, characters) == (2, size + 5)
        assert peak < (1000 if kind == "csv" else 600)


@pytest.mark.slow
def test_many_copies_of_a_large_document_are_in_memory_once(tmp_path: Path) -> None:
    large = "x" * 40_000_000
    with open(tmp_path / "a.jsonl", "w") as file:
        for index in range(12):
            file.write(json.dumps({"text": large if index else "other"}) + "\n")
    documents, characters, peak = import_giant(tmp_path / "a.jsonl")
    assert (documents, characters) == (2, 40_000_005)
    assert peak < 420


def test_a_packed_file_that_holds_far_more_than_was_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BUCKET_BYTES", 20_000)
    monkeypatch.setattr(spill, "LARGEST_BUCKET_BYTES", 80_000)
    texts = [f"{index} " + "same " * 400 for index in range(300)]
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    )
    summary = import_paths("texts", [tmp_path / "a.jsonl.gz"])
    assert (tmp_path / "a.jsonl.gz").stat().st_size < 20_000
    assert summary.documents == 300


@pytest.mark.slow
@pytest.mark.parametrize("room", [250_000_000, 420_000_000])
def test_memory_limits_of_the_process_are_no_bug(tmp_path: Path, room: int) -> None:
    """A document that does not fit the memory this process may have."""
    jsonl(tmp_path / "a.jsonl", ["x" * 100_000_000, "y"])
    script = (
        "import resource, sys\nfrom pathlib import Path\nimport pyarrow.parquet\n"
        "from picollm.data.importer import import_paths\nfrom picollm.errors import HostError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try:\n    import_paths('a', [Path(sys.argv[1])], processes=1)\n"
        "except HostError as error:\n    print(error.message)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.jsonl", str(room)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "memory ran out\n", done.stderr
