"""Events survive crashes, other versions and being read while they are written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from picollm.errors import HostError
from picollm.events import EventFollower, EventWriter, attempts, parse_line, read_all, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pretrain" / "events.jsonl"


def test_a_torn_line_is_ended_before_the_next(path: Path) -> None:
    first = EventWriter(path, "pretrain")
    first.write("step", step=1)
    first.close()
    with open(path, "ab") as file:
        file.write(b'{"v":1,"t":1.0,"stage":"pretr')
    second = EventWriter(path, "pretrain")
    second.write("step", step=2)
    second.close()
    assert len(path.read_bytes().splitlines()) == 3
    assert [event["step"] for event in read_all(path)] == [1, 2]


def test_numbers_that_json_does_not_have_become_null(path: Path) -> None:
    writer = EventWriter(path, "pretrain")
    writer.write("step", step=1, loss=math.nan, grad_norm=math.inf, lr=-math.inf, mfu=None)
    writer.close()
    event = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (event["loss"], event["grad_norm"], event["lr"], event["mfu"]) == (None, None, None, None)
    assert (event["v"], event["stage"], event["kind"], event["step"]) == (1, "pretrain", "step", 1)


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"1", b"null", b'{"v":2,"kind":"step"}', b'{"v":1}', b"\xff\xfe"])
def test_foreign_lines_are_no_events(line: bytes) -> None:
    assert parse_line(line) is None


def test_what_a_later_attempt_overtook_is_dropped(path: Path) -> None:
    writer = EventWriter(path, "pretrain")
    writer.write("stage_start", attempt=1, resumed_from=0)
    for step in (1, 2, 3):
        writer.write("step", step=step, loss=9.0)
    writer.write("checkpoint", step=2)
    writer.write("checkpoint", step=3)
    writer.write("note", text="kept")
    writer.write("stage_start", attempt=2, resumed_from=2)
    writer.write("step", step=3, loss=1.0)
    writer.close()
    kept = read_events(path)
    assert [(e["step"], e["loss"]) for e in kept if e["kind"] == "step"] == [(1, 9.0), (2, 9.0), (3, 1.0)]
    assert [e["step"] for e in kept if e["kind"] == "checkpoint"] == [2]
    assert [e["text"] for e in kept if e["kind"] == "note"] == ["kept"]
    assert attempts(path) == 2


def test_a_file_that_is_not_there_has_no_events(path: Path) -> None:
    assert read_all(path) == read_events(path) == list(EventFollower(path).poll()) == []
    assert attempts(path) == 0


def test_the_follower_waits_for_the_end_of_a_line(path: Path) -> None:
    writer = EventWriter(path, "pretrain")
    writer.write("step", step=1)
    follower = EventFollower(path)  # starts behind what is there
    assert list(follower.poll()) == []
    with open(path, "ab") as file:
        file.write(b'{"v":1,"kind":"st')
        file.flush()
        assert list(follower.poll()) == []
        file.write(b'ep","step":2}\nnonsense\n{"v":1,"kind":"step","step":3}\n{')
        file.flush()
        assert [event["step"] for event in follower.poll()] == [2, 3]
    assert list(follower.poll()) == []
    writer.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write"):
        EventWriter(tmp_path / "file" / "events.jsonl", "pretrain")


def test_a_full_disk_costs_lines_and_not_the_training(path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk; what is on the disk stays readable."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from picollm.events import EventWriter
events = EventWriter(Path({str(path)!r}), "pretrain")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for step in range(1000):
    events.write("step", step=step)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
events.close()
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("alive\n", "")
    steps = [event["step"] for event in read_all(path)]
    assert steps == list(range(len(steps))) and len(steps) > 5
