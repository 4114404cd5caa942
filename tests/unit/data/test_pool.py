"""Helper processes: their errors arrive, and none outlives its parent or its purpose."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from picollm.data.pool import in_processes
from picollm.errors import ConfigError, HostError


def add_one(number: int) -> int:
    return number + 1


def refuse(number: int) -> int:
    raise ConfigError(f"no {number}", cause="a cause", hint="a hint")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def run_out(number: int) -> int:
    raise MemoryError


def sleep(number: int) -> int:
    time.sleep(60)
    return number


def helpers() -> list[int]:
    """Processes of ours, but for multiprocessing's own tracker."""
    return [
        child.pid for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
    ]


def test_results_of_all_tasks() -> None:
    assert sorted(in_processes(add_one, range(20), 2)) == list(range(1, 21))
    assert helpers() == []


def test_an_error_of_a_task_arrives_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        list(in_processes(refuse, [1], 2))
    assert (caught.value.message, caught.value.cause, caught.value.hint) == ("no 1", "a cause", "a hint")
    assert helpers() == []


@pytest.mark.parametrize(("task", "message"), [(die, "a helper process was killed"), (run_out, "memory ran out")])
def test_a_process_that_ends_is_the_hosts_fault(task: object, message: str) -> None:
    with pytest.raises(HostError, match=message):
        list(in_processes(task, [1], 2))  # type: ignore[arg-type]
    assert helpers() == []


def test_stopping_ends_running_tasks() -> None:
    """Well before their minute is over: the test has a limit of its own."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(in_processes(sleep, [1, 2, 3], 2, tick=tick))
    assert helpers() == []
    with contextlib.closing(in_processes(sleep_unless_first, range(3), 2)) as results:
        assert next(results) == 0
    assert helpers() == []


def sleep_unless_first(number: int) -> int:
    return sleep(number) if number else 0


def test_processes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing.popen_spawn_posix as spawn

    def refuse_start(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(spawn.Popen, "__init__", refuse_start)
    with pytest.raises(HostError, match="cannot start 2 helper processes"):
        list(in_processes(add_one, [1], 2))


SCRIPT = """
import sys
from picollm.data.pool import in_processes
sys.path.insert(0, sys.argv[1])
from test_pool import sleep
if __name__ == "__main__":
    seen = False
    def tick():
        global seen
        if not seen:
            seen = True
            print("started", flush=True)
    list(in_processes(sleep, range(4), 2, tick=tick))
"""


def start(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A parent whose two helpers work."""
    (tmp_path / "parent.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", Path(__file__).parent],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    return process, psutil.Process(process.pid).children(recursive=True)


def test_ctrl_c_ends_all_of_them_without_their_tracebacks(tmp_path: Path) -> None:
    process, children = start(tmp_path)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert stderr.decode().count("Traceback") == 1  # the script's own
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_nobody_outlives_a_killed_parent(tmp_path: Path) -> None:
    process, children = start(tmp_path)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(children, timeout=30)[1] == []
