"""Files are written whole or not at all, and refused when they are not what they should be."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from picollm import files
from picollm.errors import HostError, IntegrityError
from picollm.files import (
    check_schema,
    file_stats,
    free_name,
    read_fields,
    read_json,
    sha256_json,
    write_atomic,
    write_json,
)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "config.json"
    write_atomic(path, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, broken, full)
    with pytest.raises(HostError) as caught:
        write_atomic(path, "new")
    assert str(path) in caught.value.message and caught.value.cause == "No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_sizes_while_somebody_saves_and_prunes(tmp_path: Path) -> None:
    """`picollm runs` looks at a run whose checkpoints come and go."""
    (tmp_path / "kept").write_bytes(b"123")
    stop = threading.Event()

    def churn() -> None:
        for number in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
            folder = tmp_path / f"step_{number}.tmp" / "state"
            folder.mkdir(parents=True)
            for name in "abcdefgh":
                (folder / name).touch()
            folder.parent.rename(tmp_path / f"step_{number}")
            shutil.rmtree(tmp_path / f"step_{number}")

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(churn)
        try:
            assert [sum(stat.st_size for stat in file_stats(tmp_path)) for _ in range(300)] == [3] * 300
        finally:
            stop.set()
        saving.result()


def test_a_write_makes_the_folders_above(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"name": "größer"})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "name": "größer"\n}\n'


def test_the_hash_of_json_does_not_depend_on_order() -> None:
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1}) != sha256_json({"a": 1, "b": [3]})


@pytest.mark.parametrize("content", [b"{", b"", b'"\xff"', b"[" * 100_000])
def test_torn_json_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not readable JSON") as caught:
        read_json(path, hint="make it again")
    assert caught.value.hint == "make it again"


@pytest.mark.parametrize("value", [{"schema": 2}, {"schema": "1"}, {}, [], None])
def test_another_schema_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(IntegrityError, match="another version"):
        check_schema(tmp_path / "x.json", value)


@pytest.mark.parametrize(
    ("value", "cause"), [({"schema": 1}, "`step` is missing"), ({"schema": 1, "step": "1"}, "`step` is of type str")]
)
def test_fields_are_checked(tmp_path: Path, value: dict[str, Any], cause: str) -> None:
    write_json(tmp_path / "x.json", value)
    with pytest.raises(IntegrityError) as caught:
        read_fields(tmp_path / "x.json", {"step": int}, hint="")
    assert cause in str(caught.value.cause)


def test_free_names_count_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    names = []
    for _ in range(3):
        names.append(free_name(path).name)
        free_name(path).touch()
    assert names == ["x", "x~2", "x~3"]
