"""Python's cyclic garbage collector, kept out of the middle of steps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

COLLECT_EVERY = 1000  # steps; few objects of a step are in cycles


@contextlib.contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """Collect garbage between steps only: call what is yielded after each step.

    Left alone, Python looks through all objects of the process now and then, which takes longer than launching a step,
    and on one rank at a time. What lives after the first step, compiled code above all, is not looked at again.
    """
    calls = 0

    def collect() -> None:
        nonlocal calls
        if calls % COLLECT_EVERY == 0:
            gc.collect()
        if calls == 0:
            gc.freeze()
            gc.disable()
        calls += 1

    try:
        yield collect
    finally:
        gc.unfreeze()
        gc.enable()
