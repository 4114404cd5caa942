"""Work spread over processes that end when their parent does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from picollm.errors import HostError

POLL_S = 0.2


def _start(parent: int, setup: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"  # one process, one thread of the tokenizer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if setup is not None:
        setup(*arguments)


def _end_with(parent: int) -> None:
    """A killed parent cannot tell its pool; whoever is left must not work on."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def in_processes(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    processes: int,
    *,
    setup: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """Results of `function(task)` for every task, as they come.

    However it ends, no process is left; who may stop early closes it (`contextlib.closing`), which ends them at once.

    Args:
        function, setup: of a module, so that another process can import them.
        setup: called with `arguments` once in each process.
        tick: called several times a second; what it raises ends the work.

    Raises:
        HostError: a process was killed, or could not be started.
        PicollmError: what `function` raised.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start, initargs=(os.getpid(), setup, arguments)
    )
    finished = False
    try:
        pending = _submit(pool, function, tasks, processes)
        while pending:
            done, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            tick()
            for future in done:
                yield future.result()
        finished = True
    except BrokenProcessPool as error:
        raise HostError(
            "a helper process was killed",
            cause="it ended without an answer, as it does when memory runs out",
            hint="run the same command again, with more free memory",
        ) from error
    except MemoryError as error:
        raise HostError(
            "memory ran out in a helper process", hint="run the same command again, with more free memory"
        ) from error
    finally:
        if not finished:
            for process in list((pool._processes or {}).values()):  # there is no public way to end a running task
                process.terminate()
        # Nobody may go on writing when the caller cleans up.
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, function: Callable[[Any], Any], tasks: Iterable[Any], processes: int
) -> set[Future[Any]]:
    try:
        with _interrupts_held_back():
            return {pool.submit(function, task) for task in tasks}
    except OSError as error:
        raise HostError(
            f"cannot start {processes} helper processes",
            cause=error.strerror or str(error),
            hint="raise the limit (`ulimit -u`), or use fewer CPUs: `taskset -c 0 picollm …`",
        ) from error


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here never see Ctrl-C, which a terminal sends to all of them: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
