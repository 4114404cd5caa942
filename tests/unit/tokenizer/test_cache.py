"""The token cache holds what the tokenizer gives, is made once, and is never read when it is not as written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.errors import HostError, IntegrityError, Interrupted
from picollm.locks import hold_lock
from picollm.tokenizer import cache, cache_parts
from picollm.tokenizer.cache import build, cache_dir, open_cache, wanted
from picollm.tokenizer.tokenizer import Tokenizer

LIMIT = 2.0**30
TEXTS = [f"Document {i}: " + "the river ran past a silver stone. " * (i % 5) for i in range(60)] + ["", "x"]


@pytest.fixture
def base(clean_environment: Path) -> Path:
    return clean_environment


@pytest.fixture
def notes(base: Path) -> Dataset:
    with DatasetWriter("notes") as writer:
        writer.start("text")
        for text in TEXTS:
            writer.add("train", text)
        writer.add("validation", "held back")
        writer.publish({"from": "a test"})
    return Dataset.open("notes")


def make(base: Path, notes: Dataset, tokenizer: Tokenizer, processes: int = 1) -> cache.CachedTokens:
    return build(base, notes, tokenizer, processes=processes, limit_bytes=LIMIT)


class Told(list[tuple[str, int, int]]):
    """What a build said of its progress."""

    def __call__(self, *said: Any) -> None:
        self.append(said)

    def done(self, doing: str) -> list[int]:
        return [done for said, done, _ in self if said == doing]


def read(tokens: cache.CachedTokens) -> list[list[int]]:
    found = []
    for document, size in enumerate(tokens.lengths(range(tokens.num_documents))):
        ids, mask = np.empty(size, np.int32), np.zeros(size, bool)
        tokens.copy(document, 0, ids, mask)
        assert mask.all()
        found.append(ids.tolist())
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_it_holds_what_the_tokenizer_gives(
    base: Path, notes: Dataset, tokenizer: Tokenizer, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART_CHARS", 1500)  # several parts
    made = make(base, notes, tokenizer, processes)
    assert read(made) == tokenizer.encode_batch(TEXTS)
    folder = cache_dir(base, notes, tokenizer)
    assert len(list(folder.glob("part-*.tokens"))) > 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert read(make(base, notes, tokenizer)) == read(made)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before, "it was made again"


def test_a_stopped_build_keeps_its_parts(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART_CHARS", 1500)

    def stop(doing: str, done: int, total: int) -> None:
        assert doing == "tokenising notes" and total == len(TEXTS)
        if done > total / 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=stop)
    assert open_cache(base, notes, tokenizer) is None
    folder = cache_dir(base, notes, tokenizer)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.offsets.npy")}
    assert finished
    told = Told()
    build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=told)
    assert told.done("tokenising notes")[0] > 0 and told.done("tokenising notes")[-1] == len(TEXTS)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert read(make(base, notes, tokenizer)) == tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize("damage", ["part-00000.tokens", "part-00000.offsets.npy", "index.json", "gone"])
def test_damage_is_noticed_and_mended(base: Path, notes: Dataset, tokenizer: Tokenizer, damage: str) -> None:
    expected = read(make(base, notes, tokenizer))
    folder = cache_dir(base, notes, tokenizer)
    if damage == "gone":
        (folder / "part-00000.tokens").unlink()
    else:
        content = bytearray((folder / damage).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / damage).write_bytes(content)
    assert open_cache(base, notes, tokenizer) is None
    assert read(make(base, notes, tokenizer)) == expected


@pytest.mark.parametrize("kept", [0, 1, 100, -2])
@pytest.mark.parametrize("kind", ["tokens", "offsets.npy"])
def test_a_short_file_is_never_mapped(base: Path, notes: Dataset, tokenizer: Tokenizer, kind: str, kept: int) -> None:
    """Reading behind the end of a mapped file would end the process, so sizes count even where nobody hashes."""
    expected = read(make(base, notes, tokenizer))
    path = cache_dir(base, notes, tokenizer) / f"part-00000.{kind}"
    os.truncate(path, kept % path.stat().st_size)
    assert open_cache(base, notes, tokenizer, verify=False) is None
    assert read(make(base, notes, tokenizer)) == expected


def test_a_short_part_of_an_unfinished_cache_is_made_again(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART_CHARS", 1500)
    make(base, notes, tokenizer)
    folder = cache_dir(base, notes, tokenizer)
    (folder / "index.json").unlink()
    os.truncate(folder / "part-00001.tokens", 10)
    (folder / "part-00002.tokens.99.tmp").write_text("of a process that was killed")
    whole = (folder / "part-00000.tokens").stat().st_mtime_ns
    assert read(make(base, notes, tokenizer)) == tokenizer.encode_batch(TEXTS)
    assert (folder / "part-00000.tokens").stat().st_mtime_ns == whole and not list(folder.glob("*.tmp"))


# -- two runs and one cache -------------------------------------------------------------------------------------------

MAKES = """
import sys, time
from pathlib import Path
from picollm.data.datasets import Dataset
from picollm.tokenizer import cache, cache_parts
from picollm.tokenizer.tokenizer import Tokenizer

if __name__ == "__main__":
    cache.PART_CHARS = 200
    base, tokenizer = Path(sys.argv[1]), Tokenizer(sys.stdin.buffer.read())

    def hang(doing, done, total):
        if done > 10:  # documents, of which a part has two
            print(done, flush=True)
            time.sleep(600)

    cache.build(
        base, Dataset.open("notes", base), tokenizer, processes=int(sys.argv[2]), limit_bytes=1e9, on_progress=hang
    )
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_it_waits_for_another_run_and_goes_on_when_that_is_killed(
    base: Path, notes: Dataset, tokenizer: Tokenizer, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART_CHARS", 200)
    folder, told, waits = cache_dir(base, notes, tokenizer), Told(), threading.Event()
    found: list[cache.CachedTokens] = []

    def on_progress(*said: Any) -> None:
        told(*said)
        if said[0].startswith("another run"):
            waits.set()

    def second_run() -> None:
        found.append(build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=on_progress))

    script = base / "makes.py"
    script.write_text(MAKES)
    command = [sys.executable, str(script), str(base), str(processes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        assert first.stdin and first.stdout
        first.stdin.write(tokenizer.json)
        first.stdin.close()
        try:
            assert first.stdout.readline(), "it did not begin"
            made = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.offsets.npy")}
            thread = threading.Thread(target=second_run)
            thread.start()
            assert waits.wait(60) and not found
        finally:
            first.send_signal(signal.SIGKILL)
    thread.join(60)
    assert read(found[0]) == tokenizer.encode_batch(TEXTS)
    doing, done, total = told[0]
    assert doing == f"another run (process {first.pid}) is making the tokens of notes"
    assert 0 < len(made) <= done <= total == len(list(folder.glob("*.tokens")))
    assert told.done("tokenising notes")[0] >= 10, "what was made is made again"
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())


def test_a_stop_is_obeyed_while_it_waits(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    def stop(doing: str, done: int, total: int) -> None:
        assert doing == f"another run (process {os.getpid()}) is making the tokens of notes"
        raise Interrupted("stopped")

    lock = cache._lock_of(cache_dir(base, notes, tokenizer))
    with hold_lock(lock, "another run's cache"):
        with pytest.raises(Interrupted):
            build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=stop)
        assert not cache_dir(base, notes, tokenizer).exists()
    make(base, notes, tokenizer)  # the wait left no lock behind


def test_waiting_for_a_run_that_checks_says_so(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    make(base, notes, tokenizer)
    told = Told()

    def once(*said: Any) -> None:
        told(*said)
        raise Interrupted("stopped")

    with hold_lock(cache._lock_of(cache_dir(base, notes, tokenizer)), "the cache"), pytest.raises(Interrupted):
        build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=once)
    assert told == [(f"another run (process {os.getpid()}) is checking the tokens of notes", 0, 0)]


def test_hashing_is_told_and_can_be_stopped(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART_CHARS", 200)
    monkeypatch.setattr(cache_parts, "POLL_S", 0.001)
    make(base, notes, tokenizer)
    released, hashed = threading.Event(), cache_parts.sha256_file

    def slow(path: Path) -> str:
        if path.name.startswith("part-00003"):
            released.wait(60)
        return hashed(path)

    monkeypatch.setattr(cache_parts, "sha256_file", slow)
    told = Told()

    def stop(doing: str, done: int, total: int) -> None:
        told(doing, done, total)
        if done == total - 1:  # the others went on beside the slow one
            released.set()
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        open_cache(base, notes, tokenizer, on_progress=stop)
    assert {doing for doing, _, _ in told} == {"checking the tokens of notes"}
    told.clear()
    assert open_cache(base, notes, tokenizer, on_progress=told) is not None
    assert told[-1][1] == told[-1][2] == len(list(cache_dir(base, notes, tokenizer).glob("*.tokens")))


# -- what else may happen to it ---------------------------------------------------------------------------------------


def test_a_damaged_shard_is_never_tokenised(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    shard = notes.path / next(file.name for file in notes.files if file.split == "train")
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match=shard.name):
        make(base, notes, tokenizer)
    assert open_cache(base, notes, tokenizer) is None


def test_room_is_made_by_removing_what_was_used_longest_ago(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    others = [base / "cache/tokens" / name for name in ("old", "older", "mine")]
    for age, folder in enumerate(others, 1):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x" * 1000)
        (folder / "index.json").write_text("{}")
        os.utime(folder / "index.json", (1e9 - age, 1e9 - age))
    limit = 2 * 1002 + cache.expected_bytes(notes) + 1
    build(base, notes, tokenizer, processes=1, limit_bytes=limit, keep=[others[2]])
    assert [folder.exists() for folder in others] == [True, False, True]


def test_a_cache_that_is_being_made_is_not_removed_for_room(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    other = base / "cache/tokens/other"
    other.mkdir(parents=True)
    (other / "part").write_bytes(b"x" * 1000)
    with hold_lock(cache._lock_of(other), "another run's cache"):
        build(base, notes, tokenizer, processes=1, limit_bytes=1.0)
        assert other.exists()
    cache._make_room(cache_dir(base, notes, tokenizer), 0.0, 1.0, [])
    assert not other.exists()


def test_an_open_cache_holds_no_files_open(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large dataset has thousands of parts, and a process often may not open more than 1 024 files."""
    monkeypatch.setattr(cache, "PART_CHARS", 300)
    made = make(base, notes, tokenizer)
    assert len(list(cache_dir(base, notes, tokenizer).glob("*.tokens"))) > 5
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = open_cache(base, notes, tokenizer)
    assert found is not None and len(list(Path("/proc/self/fd").iterdir())) == before
    assert read(found) == read(made) == tokenizer.encode_batch(TEXTS)


def test_a_cache_of_somebody_else_is_read(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(make(base, notes, tokenizer))

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(cache.os, "utime", refuse)
    found = open_cache(base, notes, tokenizer)
    assert found is not None and read(found) == expected


def test_a_cache_that_is_removed_while_it_is_made(base: Path, notes: Dataset, tokenizer: Tokenizer) -> None:
    folder = cache_dir(base, notes, tokenizer)

    def remove(doing: str, done: int, total: int) -> None:
        if doing.startswith("checking"):
            (folder / "part-00000.tokens").unlink(missing_ok=True)

    with pytest.raises(IntegrityError, match="changed while it was made") as caught:
        build(base, notes, tokenizer, processes=1, limit_bytes=LIMIT, on_progress=remove)
    assert "part-00000" in (caught.value.cause or "")


def test_a_full_disk_is_noticed_before_tokenising(
    base: Path, notes: Dataset, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(HostError, match="no room") as full:
        make(base, notes, tokenizer)
    assert "data.cache_gib=0" in (full.value.hint or "")
    assert not list(cache_dir(base, notes, tokenizer).glob("part-*"))


def test_when_it_is_worth_it(notes: Dataset) -> None:
    chars = notes.chars("train")
    assert wanted(notes, chars / 4, LIMIT)[0]
    assert wanted(notes, chars / 40, LIMIT) == (False, "the run tokenises only 10% as much text as the dataset has")
    assert wanted(notes, chars / 40, LIMIT, readers=8)[0], "eight ranks would tokenise most of it eight times"
    assert "more than `data.cache_gib` leaves" in wanted(notes, chars, 10.0)[1]
    assert wanted(notes, chars, 0.0) == (False, "`data.cache_gib` is 0")
