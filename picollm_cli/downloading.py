"""Showing a download: every file and the whole on a terminal, else a plain line every few seconds; all on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from picollm.units import duration, size
from picollm_cli.console import PLAIN_LINE_EVERY_S, Output

if TYPE_CHECKING:
    from picollm.data.datasets import Dataset
    from picollm.data.download import Download, State

REFRESH_S = 0.2


def watch(out: Output, download: Download) -> None:
    """Show a download until it is over.

    Raises:
        RemoteError, HostError, ConfigError: files are missing in the end; they are named.
    """
    with _display(out, download.dataset.name) as show:
        while not download.wait(REFRESH_S):
            show(download.state())
        show(download.state())
    download.check()


def announce(out: Output, dataset: Dataset) -> None:
    """Say what is about to be fetched, and how much it is."""
    from picollm.estimate import DOWNLOAD_BYTES_PER_S

    missing = dataset.missing()
    to_come = sum(file.bytes for file in missing)
    train, validation = len(dataset.of("train")), len(dataset.of("validation"))
    part = "" if len(missing) == len(dataset.files) else f", of which {size(to_come)} are still to come"
    if not missing:
        out.note(f"dataset `{dataset.name}`: {len(dataset.unverified()):,} files were touched and are hashed again")
        return
    out.note(
        f"dataset `{dataset.name}`: {train:,} training and {validation} validation shards of "
        f"{dataset.source['hub']} at {dataset.source['revision'][:12]}, {size(dataset.bytes())}{part}; "
        f"about {duration(max(1, round(to_come / DOWNLOAD_BYTES_PER_S)))} at {DOWNLOAD_BYTES_PER_S / 1e6:.0f} MB/s"
    )


def line(name: str, state: State) -> str:
    """How far a download is, in a line."""
    left = f", about {duration(round(state.left_s))} left" if state.left_s else ""
    return (
        f"downloading {name}: {state.files:,} of {state.num_files:,} files, {size(state.bytes)} of "
        f"{size(state.num_bytes)}, {size(state.rate)}/s{left}"
    )


def pin_for_run(name: str, tokens: int) -> Dataset:
    """A dataset of the registry with shards enough for a new run of so many tokens; what is larger stays as it is."""
    from picollm.data.pinned import pin
    from picollm.data.registry import REGISTRY

    known = REGISTRY[name]
    return pin(name, known.source, shards=known.shards_for(tokens))


@contextmanager
def _display(out: Output, name: str) -> Iterator[Callable[[State], None]]:
    if not out.redraws:
        last = time.monotonic()

        def plain(state: State) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= PLAIN_LINE_EVERY_S:
                last = now
                out.note(line(name, state))

        yield plain
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TextColumn("{task.fields[note]}"), console=out.stderr, transient=True,
    ) as bars:  # fmt: skip
        whole = bars.add_task(name, total=None, note="")
        files: dict[str, TaskID] = {}

        def draw(state: State) -> None:
            left = f", {duration(round(state.left_s))} left" if state.left_s else ""
            note = f"{state.files:,}/{state.num_files:,} files, {size(state.rate)}/s{left}"
            bars.update(whole, completed=state.bytes, total=state.num_bytes, note=note)
            active = {file for file, _, _ in state.active}
            for file in files.keys() - active:
                bars.remove_task(files.pop(file))
            for file, got, total in state.active:
                if file not in files:
                    files[file] = bars.add_task(f"  {file}", total=total, note="")
                bars.update(files[file], completed=got)

        yield draw
