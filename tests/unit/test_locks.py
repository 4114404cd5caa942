from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from picollm.errors import HostError
from picollm.locks import hold_lock

HOLD = """
import sys
from pathlib import Path
from picollm.locks import hold_lock
with hold_lock(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_process_that_holds_a_lock_is_named_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(HostError, match="run `r` is in use") as caught, hold_lock(path, "run `r`"):
            pass
        assert f"process {other.pid} holds" in str(caught.value.cause) and f"kill {other.pid}" in str(caught.value.hint)
        other.kill()
    # The kernel dropped it; the name of its owner is stale and in nobody's way.
    with hold_lock(path, "run `r`"):
        assert path.with_name("lock.owner").read_text() != f"{other.pid}\n"
    assert not path.with_name("lock.owner").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write"), hold_lock(tmp_path / "file" / "lock", "x"):
        pass


def test_waiting_for_a_lock_without_an_end(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "held\n"

        def on_wait(pid: str) -> None:
            told.append(pid)
            if len(told) == 2:
                other.kill()

        with hold_lock(path, "x", on_wait=on_wait):
            assert told[:2] == [str(other.pid)] * 2
        with (
            hold_lock(path, "x", on_wait=on_wait),
            pytest.raises(ZeroDivisionError),
            hold_lock(path, "x", on_wait=lambda pid: 1 / 0),
        ):
            pass
