"""Imports by several processes: what comes out depends on the rows alone, and faults are named as by one process."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picollm.data import intake, sources, spill
from picollm.data.datasets import Dataset
from picollm.data.importer import import_paths
from picollm.data.intake import split_position
from picollm.data.readers import place, read_records
from picollm.data.sources import find_files, tasks_of
from picollm.data.spill import place_of
from picollm.errors import ConfigError, HostError, PicollmError
from picollm.hardware import usable_cpus

TEXTS = [f"text number {index}, tä𝄞\n" * (1 + index % 5) for index in range(400)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def rows(dataset: Dataset) -> tuple[list[str], list[str]]:
    return list(dataset.documents("train")), list(dataset.documents("validation"))


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of several kinds, one of them larger than a task; 20 rows come twice."""
    made = tmp_path / "in"
    made.mkdir()
    (made / "a.jsonl").write_bytes(lines(TEXTS[:250]))
    (made / "b.jsonl").write_bytes(lines(TEXTS[230:300]))
    pq.write_table(pa.table({"text": TEXTS[300:390]}), made / "c.parquet", row_group_size=7)
    for index in range(390, 400):
        (made / f"d{index}.txt").write_text(TEXTS[index])
    return made


def test_any_number_of_processes_and_any_order_of_files(folder: Path, tmp_path: Path, small_tasks: None) -> None:
    found = set()
    files = sorted(folder.iterdir())
    for processes in (1, 2, 3):
        random.Random(processes).shuffle(files)
        summary = import_paths("texts", files, base=tmp_path / str(processes), processes=processes)
        found.add((summary.dataset.sha256, summary.documents, summary.duplicates))
    assert len(found) == 1
    assert found.pop()[1:] == (400, 20)
    train, validation = rows(summary.dataset)
    assert train == sorted((t for t in TEXTS if split_position(t) >= 0.05 * 2**64), key=lambda t: place_of(t.encode()))
    assert set(validation) == set(TEXTS) - set(train)


Documents = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60),
    min_size=2, max_size=40,
).filter(lambda texts: len({text for text in texts if not text.isspace()}) >= 2)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(texts=Documents, data=st.data())
def test_every_distinct_row_once_and_both_sides_of_the_split(texts: list[str], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(texts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(texts)), max_size=3)))
    good = {text for text in texts if not text.isspace()}
    with (
        tempfile.TemporaryDirectory() as temporary,
        mock.patch.object(sources, "TASK_BYTES", data.draw(st.integers(1, 500))),
        mock.patch.object(spill, "BUCKET_BYTES", data.draw(st.integers(1, 500))),
        mock.patch.object(spill, "BUFFER_BYTES", data.draw(st.integers(1, 2000))),
    ):
        top = Path(temporary)
        (top / "one.jsonl").write_bytes(lines(texts))
        parts = []
        for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(texts)], strict=True)):
            parts.append(top / f"{number}.jsonl")
            parts[-1].write_bytes(lines(shuffled[start:end]))
        one = import_paths("texts", [top / "one.jsonl"], base=top / "one", processes=1)
        two = import_paths("texts", parts[::-1], base=top / "two", processes=1)
        train, validation = rows(one.dataset)
        assert rows(two.dataset) == (train, validation)
    assert sorted(train + validation) == sorted(good)
    assert one.documents + one.duplicates + one.rejected.get("empty", 0) == len(texts)
    assert train
    assert validation
    sides = {text: split_position(text) < 0.05 * 2**64 for text in good}
    if len(set(sides.values())) == 2:  # else a few documents were put right
        assert all(sides[text] for text in validation)
        assert not any(sides[text] for text in train)


# -- pieces -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text("ab\n", max_size=30), min_size=1, max_size=30),
    size=st.integers(1, 200),
    ends=st.booleans(),
    mark=st.booleans(),
)
def test_pieces_of_a_file_hold_each_line_once(texts: list[str], size: int, ends: bool, mark: bool) -> None:
    data = lines(texts)[: None if ends else -1].replace(b"}\n", b"}\n\n", 2)
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(sources, "TASK_BYTES", size):
        path = Path(temporary, "a.jsonl")
        path.write_bytes(b"\xef\xbb\xbf" * mark + data)
        files, _ = find_files([path], Path(temporary))
        pieces = [piece for task in tasks_of(files) for piece in task]
        found = [
            (place(piece, record.number), record.row) for piece in pieces for record in read_records(piece, "text")
        ]
        whole = data.decode().split("\n")
    assert sum(piece.bytes for piece in pieces) == len(data) + 3 * mark
    expected = [(f"{path}:{number}", json.loads(line)["text"]) for number, line in enumerate(whole, 1) if line]
    assert found == [(where, text if text.strip() else None) for where, text in expected]


def test_parquet_is_cut_at_row_groups(folder: Path, tmp_path: Path, small_tasks: None) -> None:
    files, _ = find_files([folder / "c.parquet"], tmp_path)
    pieces = [piece for task in tasks_of(files) for piece in task]
    assert len(pieces) > 1
    assert abs(sum(piece.bytes for piece in pieces) - files[0].size) <= len(pieces)
    found = [(place(piece, record.number), record.row) for piece in pieces for record in read_records(piece, "text")]
    assert found == [(f"{folder}/c.parquet:{number}", text) for number, text in enumerate(TEXTS[300:390], 1)]


def test_work_is_handed_out_in_useful_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", 100)
    monkeypatch.setattr(sources, "TASK_FILES", 3)
    for name, size in {"a": 30, "b": 60, "c": 20, "d": 250, "e": 1, "f": 1, "g": 1, "h": 1}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    files, _ = find_files([tmp_path], tmp_path)
    shapes = [[(piece.file.path.stem, piece.bytes) for piece in task] for task in tasks_of(files)]
    assert shapes == [
        [("a", 30), ("b", 60), ("c", 20)], [("d", 100)], [("d", 100)], [("d", 50)],
        [("e", 1), ("f", 1), ("g", 1)], [("h", 1)],
    ]  # fmt: skip


# -- faults -----------------------------------------------------------------------------------------------------------


def left() -> list[str]:
    folder = Path(os.environ["PICOLLM_BASE_DIR"]) / "datasets"
    return [path.name for path in folder.iterdir()]


def refused(path: Path) -> PicollmError:
    with pytest.raises(PicollmError) as caught:
        import_paths("bad", [path], processes=2)
    assert left() == []
    assert [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())] == []
    return caught.value


def test_a_bad_line_late_in_a_large_file(tmp_path: Path, small_tasks: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:333]) + b"{oops}\n" + lines(TEXTS[333:]))
    error = refused(path)
    assert isinstance(error, ConfigError)
    assert error.message == f"`{path}:334` is not JSON"


def test_mixed_kinds_in_different_processes(tmp_path: Path, small_tasks: None) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:200]) + (json.dumps(chat) + "\n").encode() * 100)
    error = refused(path)
    assert "is of another kind than what came before" in error.message
    assert int(error.message.split("`")[1].rpartition(":")[2]) > 200
    assert "it is a conversation, but the first row" in (error.cause or "")


def test_a_bad_parquet_row_group(tmp_path: Path, small_tasks: None) -> None:
    path = tmp_path / "a.parquet"
    values = pa.array([text.encode() for text in TEXTS[:300]] + [b"\xff"] + [b"x"] * 10).view(pa.string())
    pq.write_table(pa.table({"text": values}), path, row_group_size=10)
    assert f"{path}:301` is not UTF-8" in refused(path).message


def test_a_disk_that_fills_up_under_helpers(folder: Path, small_tasks: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        error = refused(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, HostError)
    assert "cannot write" in error.message
    assert ".rows" in error.message  # while it was spilling


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buckets fit under the limit, the shard does not."""
    monkeypatch.setattr(spill, "BUCKET_BYTES", 500)
    (tmp_path / "a.jsonl").write_bytes(lines([random.Random(i).randbytes(200).hex() for i in range(200)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        error = refused(tmp_path / "a.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error, HostError)
    assert error.message.startswith("cannot write")
    assert ".rows" not in error.message


def test_progress_never_goes_back_and_reaches_the_end(folder: Path, small_tasks: None) -> None:
    seen: list[tuple[int, int]] = []
    import_paths("texts", [folder], processes=2, on_progress=lambda done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_processes_follow_the_cpus_of_this_process(
    folder: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def in_processes(function: object, tasks: object, processes: int, **rest: object) -> object:
        used.append(processes)
        return pool(function, tasks, 2, **rest)

    pool = intake.in_processes
    monkeypatch.setattr(intake, "in_processes", in_processes)
    for cpus in (1, 3, 100):
        monkeypatch.setattr(intake, "usable_cpus", lambda cpus=cpus: cpus)
        import_paths(f"texts{cpus}", [folder])
    assert used == [3, intake.MAX_PROCESSES]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


SCRIPT = """
import sys
from pathlib import Path
from picollm.data import intake, sources
from picollm.data.importer import import_paths
read = intake.digest_of
def digest_of(file):
    open(sys.argv[2]).read()
    return read(file)
intake.digest_of = digest_of  # in helpers too: they import this file
if __name__ == "__main__":
    sources.TASK_BYTES = 2000
    import_paths("texts", [Path(sys.argv[1])], processes=2)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(folder: Path, tmp_path: Path, how: signal.Signals, clean_environment: Path) -> None:
    """A pipe that nobody fills holds the helpers in the middle of their work."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", folder, tmp_path / "pipe"], start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, stderr=subprocess.PIPE,
    )  # fmt: skip
    with open(tmp_path / "pipe", "w"):  # opens when a helper waits at the other end
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
        _, stderr = process.communicate(timeout=30)
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert stderr.decode().count("Traceback") == (1 if how == signal.SIGINT else 0)  # the script's own
    datasets = clean_environment / "datasets"
    if how == signal.SIGKILL:
        assert [path.name for path in datasets.iterdir()] == [f".texts.{process.pid}.scratch.tmp"]
        assert import_paths("texts", [folder]).documents == 400
        assert left() == ["texts"]
    else:
        assert left() == []


def test_rules_reach_the_helpers(folder: Path, small_tasks: None) -> None:
    summary = import_paths("texts", [folder], min_chars=40, processes=2)
    long = [text for text in TEXTS if len(text) >= 40]
    assert summary.documents == len(long)
    assert summary.rejected == {
        "shorter than 40 characters": 400 - len(long) + sum(len(t) < 40 for t in TEXTS[230:250])
    }
