"""`picollm data download`: a dataset of the Hub, every file of it verified."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from picollm.errors import Interrupted
from picollm.units import duration, size
from picollm_cli.console import Output
from picollm_cli.options import Json

if TYPE_CHECKING:
    from picollm.data.datasets import Dataset
    from picollm.data.registry import HubSource


def download(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="climbmix, fineweb-edu, `hf:org/name[:config][@revision]`, or a dataset that is not complete.",
            show_default=False,
        ),
    ],
    shards: Annotated[
        Optional[int],
        typer.Option("--shards", min=1, metavar="N", help="Training files, the first by name.", show_default=False),
    ] = None,
    name: Annotated[
        Optional[str], typer.Option("--name", metavar="NAME", help="Name for the dataset here.", show_default=False)
    ] = None,
    field: Annotated[
        Optional[str],
        typer.Option("--field", metavar="NAME", help="Column that holds the text, else `text`.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=64, help="Files that are fetched side by side.")] = 8,
    json: Json = False,
) -> None:
    """Download a dataset from the Hugging Face Hub.

    Which files, with size and sha256, is written down first; a file gets its
    name when it is verified. The validation shard comes on top of N. The same
    command goes on where it was interrupted, and a larger N adds shards: runs
    that were trained on fewer keep theirs. Exits 6 and names what is missing.

    \b
    Examples:
      picollm data download climbmix --shards 8
      picollm data download climbmix
      picollm data download hf:org/name:config --shards 4 --name mine --field content
    """
    import time

    from picollm.data.download import Download
    from picollm.data.pinned import pin
    from picollm_cli.downloading import announce, watch

    out, started = Output(json), time.monotonic()
    source, local = _meant(dataset, name)
    found = pin(local, source, shards=shards, field=field)
    if to_come := found.unverified():
        announce(out, found)
        try:
            with Download(found, jobs=jobs) as fetching:
                watch(out, fetching)
        except KeyboardInterrupt:
            raise Interrupted(
                "the download was stopped",
                cause="whole files and half ones are kept",
                hint=f"go on with `picollm data download {local}`",
            ) from None
    seconds = time.monotonic() - started
    summary = f"{len(found.of('train')):,} training shards, {found.known_rows():,} rows, {size(found.bytes())}"
    if to_come:
        out.print(f"dataset `{local}` is complete and verified after {duration(seconds)}: {summary}")
        out.hint(f"train on it with `picollm speedrun --preset d12 --set data.dataset={local}`")
    else:
        out.print(f"dataset `{local}` is there already: {summary}; nothing to do")
    if order := reading_order(found):
        out.note(f"\n{order}")
    out.result(
        {
            "name": local,
            "path": str(found.path),
            "sha256": found.sha256,
            "source": found.source,
            "shards": len(found.of("train")),
            "files": len(found.files),
            "fetched": len(to_come),
            "rows": found.known_rows(),
            "bytes": found.bytes(),
        }
    )


def reading_order(dataset: Dataset) -> str | None:
    """What to know about a large dataset that nobody is known to have shuffled; None for any other."""
    from picollm.data.order import BLOCK_DOCUMENTS, WHOLE_SHUFFLE_DOCUMENTS

    rows = dataset.known_rows("train")
    if dataset.is_shuffled or rows is None or rows <= WHOLE_SHUFFLE_DOCUMENTS:
        return None
    return (
        f"`{dataset.name}` has more than {WHOLE_SHUFFLE_DOCUMENTS:,} documents: training does not shuffle them one by "
        f"one but in blocks of {BLOCK_DOCUMENTS:,} neighbours. That is enough where the files are shuffled, as their "
        "author may say. Where neighbours are alike, because they are sorted by source or date, make a shuffled copy: "
        f"`picollm data import {dataset.name}-shuffled {shlex.quote(str(dataset.path))}/*.parquet "
        f"--field {shlex.quote(dataset.column)}`"
    )


def _meant(dataset: str, name: str | None) -> tuple[HubSource, str]:
    """(where it is on the Hub, what it is called here); a dataset that is here says both itself."""
    from picollm.data.datasets import Dataset
    from picollm.data.registry import REGISTRY, HubSource, local_name, source_named
    from picollm.errors import ConfigError, MissingArtifact

    if name is not None or dataset in REGISTRY or dataset.startswith("hf:"):
        return source_named(dataset), name or local_name(dataset)
    try:
        here = Dataset.open(dataset)
    except (ConfigError, MissingArtifact):
        return source_named(dataset), dataset  # which says what could be meant
    if not here.is_downloaded:
        raise ConfigError(
            f"dataset `{dataset}` was not downloaded",
            cause="it was made on this machine",
            hint=f"see what it is with `picollm data show {dataset}`",
        )
    repo, config = here.source["hub"], here.source.get("config")
    known = (entry.source for entry in REGISTRY.values() if entry.source.repo == repo)
    return next(known, HubSource(repo, config)), dataset
