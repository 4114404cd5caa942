"""The token cache of a training stage: rank 0 sees that it is there, all ranks read it.

Making one may take longer than a collective may, so other ranks wait by looking at a file of the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from picollm import hardware
from picollm.data.datasets import Dataset
from picollm.data.token_source import TokenSource
from picollm.errors import IntegrityError, Interrupted, WorkerError
from picollm.files import write_atomic
from picollm.tokenizer import cache
from picollm.worker import Worker

if TYPE_CHECKING:
    from picollm.stages.training import Inputs

TELL_EVERY_S = 1.0
POLL_S = 0.1
READY, STOPPED = "ready", "stopped"


def token_sources(worker: Worker, inputs: Inputs, live: Callable[[Dataset], TokenSource]) -> list[TokenSource]:
    """The training text of every dataset as tokens: from the cache where that is worth it, else from `live`.

    Raises:
        Interrupted: a stop was asked for; the parts that are finished stay.
        IntegrityError: a shard of a dataset is not as recorded.
        HostError: the disk is full.
    """
    chosen = _choose(worker, inputs)
    if chosen:
        _see_that_they_are_there(worker, inputs, chosen)
    sources = []
    for dataset in inputs.datasets:
        dataset.check_sizes("train")  # a cache must not hide that the text is gone
        found = None
        if dataset in chosen:
            found = cache.open_cache(worker.stage.run.base, dataset, inputs.tokenizer, verify=False)
            if found is None:
                raise IntegrityError(
                    f"the token cache of `{dataset.name}` was there and is gone",
                    hint="run the same command again; it is made again",
                )
        sources.append(found or live(dataset))
    return sources


def _choose(worker: Worker, inputs: Inputs) -> list[Dataset]:
    """Datasets to be cached; the same on every rank."""
    recipe, room = inputs.recipe, inputs.runtime.cache_gib * 2**30
    total = sum(source.weight for source in recipe.data)
    chosen, reasons = [], []
    for dataset, source in zip(inputs.datasets, recipe.data, strict=True):
        tokens = recipe.steps * recipe.batch_tokens * source.weight / total
        is_wanted, reason = cache.wanted(dataset, tokens, room, readers=worker.world)
        if is_wanted:
            chosen.append(dataset)
            room -= cache.expected_bytes(dataset)
        reasons.append(f"`{dataset.name}` {'cached' if is_wanted else 'tokenised as it is read'}: {reason}")
    worker.note(f"tokens of {'; '.join(reasons)}")
    return chosen


def _see_that_they_are_there(worker: Worker, inputs: Inputs, chosen: list[Dataset]) -> None:
    told = worker.stage.tokens_path
    if worker.rank:
        _wait_for_rank_0(worker)
        return
    try:
        base = worker.stage.run.base
        keep = [cache.cache_dir(base, dataset, inputs.tokenizer) for dataset in chosen]
        for dataset in chosen:
            cache.build(
                base,
                dataset,
                inputs.tokenizer,
                processes=hardware.usable_cpus(),
                limit_bytes=inputs.runtime.cache_gib * 2**30,
                keep=keep,
                on_progress=_progress(worker, dataset),
            )
        worker.event("phase", text="")
    except Interrupted:
        write_atomic(told, STOPPED)
        raise
    if worker.world > 1:
        write_atomic(told, READY)


def _progress(worker: Worker, dataset: Dataset) -> cache.Progress:
    told, told_at = "", 0.0

    def tell(doing: str, done: int, total: int) -> None:
        nonlocal told, told_at
        if worker.should_stop():
            raise Interrupted(f"stopped before the tokens of `{dataset.name}` were there; what is done stays")
        if doing != told or time.monotonic() - told_at >= TELL_EVERY_S:
            told, told_at = doing, time.monotonic()
            share = f", {100 * done // total} %" if total else ""
            worker.event("phase", text=f"{doing}{share}…")

    return tell


def _wait_for_rank_0(worker: Worker) -> None:
    stage = worker.stage
    while not stage.tokens_path.exists():
        if (stage.log_dir / "error.json").exists():
            raise WorkerError("another process of the stage failed while it made the token cache")
        time.sleep(POLL_S)
    if stage.tokens_path.read_text() == STOPPED:
        raise Interrupted("stopped before the tokens were there; what is done stays")
