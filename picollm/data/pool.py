"""Work spread over processes that end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
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

    Args:
        function, setup: of a module, so that another process can import them.
        setup: called with `arguments` once in each process.
        tick: called several times a second; what it raises ends the work.

    Raises:
        HostError: a process was killed.
        PicollmError: what `function` raised.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start, initargs=(os.getpid(), setup, arguments)
    )
    try:
        pending: set[Future[Any]] = {pool.submit(function, task) for task in tasks}
        while pending:
            finished, pending = wait(pending, timeout=POLL_S, return_when=FIRST_COMPLETED)
            tick()
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise HostError(
            "a helper process was killed",
            cause="it ended without an answer, as it does when memory runs out",
            hint="run the same command again, with more free memory",
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()):  # there is no public way to end a running task
            process.terminate()
