"""`picollm data`: make, list, look at and check datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from picollm.errors import IntegrityError
from picollm.units import size
from picollm_cli.commands.data_download import download, reading_order
from picollm_cli.console import Output
from picollm_cli.options import Json, Yes

if TYPE_CHECKING:
    from picollm.data.dataset_record import Split
    from picollm.data.datasets import Dataset

HELP = """Make, list and check datasets.

\b
Examples:
  picollm data import notes ~/notes
  picollm data list
  picollm data show notes
  picollm data verify notes
  picollm data remove notes
"""
app = typer.Typer(no_args_is_help=True, help=HELP)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the dataset.", show_default=False)]
PREVIEW_CHARS = 600
MEBIBYTE = 2**20


@app.command("import")
def import_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name for the dataset.", show_default=False)],
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH",
            help="Folders, or files ending in .txt .md .rst .jsonl .csv (also .gz .zst) or .parquet; `-` is stdin.",
            show_default=False,
        ),
    ],
    field: Annotated[str, typer.Option("--field", metavar="NAME", help="Column or key that holds the text.")] = "text",
    min_chars: Annotated[
        int, typer.Option("--min-chars", metavar="N", min=0, help="Leave out documents shorter than N characters.")
    ] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a dataset of that name; the old one moves to `datasets/.old/`.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a dataset from your own text or conversations.

    Duplicates are dropped and the rest is shuffled. About 5 % of the
    documents, chosen by a hash of their text, become the validation split.
    Plain-text files longer than 16 000 characters are cut at blank lines.
    Rows with `messages` are conversations.

    \b
    Examples:
      picollm data import notes ~/notes
      picollm data import books a.txt b.txt --field text
      picollm data import wiki wiki.parquet --field content
      picollm data import dialogues chats.jsonl.gz
      zcat logs.gz | picollm data import logs - --min-chars 200
    """
    from picollm.data.importer import import_paths

    out = Output(json)
    with out.progress(f"importing {name}", unit="MiB") as update:
        last = -1

        def on_progress(done: int, total: int) -> None:
            nonlocal last
            if (now := done // MEBIBYTE) != last:
                last = now
                update(now, max(1, total // MEBIBYTE))

        summary = import_paths(name, paths, field=field, min_chars=min_chars, force=force, on_progress=on_progress)
    if summary.already_there:
        out.note(f"dataset `{name}` is already there, made by the same import; nothing changed")
    rows: list[tuple[str, str]] = [
        (_noun(summary.dataset.kind), f"{summary.documents:,}"),
        ("characters", f"{summary.characters:,}"),
        ("validation", f"{summary.validation:,} ({summary.validation / summary.documents:.1%})"),
        ("duplicates", f"{summary.duplicates:,}"),
        ("files read", f"{summary.num_files:,}"),
    ]
    if summary.num_skipped:
        rows.append(("files of other kinds", f"{summary.num_skipped:,}"))
    rows += [(f"rejected: {reason}", f"{count:,}") for reason, count in summary.rejected.items()]
    out.print(_facts(rows))
    if summary.moved_to:
        out.note(f"the old dataset is kept in `{summary.moved_to}`")
    if not json:
        out.hint(_train_hint(summary.dataset))
    out.result(summary.to_json())


app.command()(download)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the datasets on this machine.

    \b
    Examples:
      picollm data list
      picollm data list --json
    """
    from rich.table import Table

    from picollm.data.datasets import list_datasets
    from picollm.run_dir import datasets_dir

    out = Output(json)
    torn: list[dict[str, Any]] = []

    def on_problem(name: str, error: Any) -> None:
        torn.append({"name": name, "error": error.to_dict()})
        out.warn(f"{error.message}: {error.cause}")

    datasets = list_datasets(on_problem=on_problem)
    if datasets:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name", no_wrap=True)
        table.add_column("kind")
        for heading in ("train", "validation", "characters", "on disk"):
            table.add_column(heading, justify="right")
        for dataset in datasets:
            table.add_row(
                dataset.name, dataset.kind, _rows(dataset, "train"), _rows(dataset, "validation"),
                f"{dataset.chars():,}", size(dataset.bytes()),
            )  # fmt: skip
        out.table(table)
    elif not torn:
        out.note(f"no dataset yet in `{datasets_dir()}`")
        out.hint(
            "make one with `picollm data import NAME PATH…`, or the built-in one with `picollm data show toy-world`"
        )
    out.result({"path": str(datasets_dir()), "datasets": [dataset.to_json() for dataset in datasets], "torn": torn})


@app.command()
def show(
    name: Name,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many rows to print.")] = 3,
    split: Annotated[Literal["train", "validation"], typer.Option("--split", help="Which split.")] = "train",
    json: Json = False,
) -> None:
    """Show what a dataset holds, and its first rows.

    \b
    Examples:
      picollm data show toy-world
      picollm data show notes --rows 10 --split validation
      picollm data show notes --rows 0 --json
    """
    from picollm.data.dataset_record import SPLITS
    from picollm.data.toy_datasets import ensure

    out = Output(json)
    dataset = ensure(name)
    first = [] if dataset.missing(split) else dataset.first_rows(split, rows)
    facts = [("name", dataset.name), ("kind", dataset.kind), ("path", str(dataset.path)), ("sha256", dataset.sha256)]
    for each in SPLITS:
        facts.append(
            (each, f"{_rows(dataset, each, noun=True)}, {dataset.chars(each):,} characters, "
                   f"{size(dataset.bytes(each))} on disk")
        )  # fmt: skip
    source = {key: value for key, value in dataset.source.items() if key != "sha256"}
    facts.append(("source", ", ".join(f"{key} {_plain(value)}" for key, value in source.items())))
    if order := reading_order(dataset):
        facts.append(("order", order))
    out.print(_facts(facts))
    for number, row in enumerate(first):
        out.print(f"\n-- {split} {number} --", style="quiet")
        if isinstance(row, str):
            out.print(_preview(row))
        else:
            for message in row["messages"]:
                out.print(f"{message['role']}: {_preview(_content(message['content']))}")
    out.result(dataset.to_json() | {"split": split, "rows": first})


@app.command()
def verify(name: Name, json: Json = False) -> None:
    """Hash every file of a dataset again and compare with its record.

    Exits 5 and names the files when one is not as recorded.

    \b
    Examples:
      picollm data verify notes
      picollm data verify notes --json
    """
    from picollm.data.datasets import Dataset

    out = Output(json)
    dataset = Dataset.open(name)
    with out.progress(f"verifying {name}", unit="MiB") as update:
        problems = dataset.verify(lambda done, total: update(done // MEBIBYTE, max(1, total // MEBIBYTE)))
    if dataset.is_downloaded and 0 < len(problems) == len(dataset.missing()):
        dataset.check_sizes()  # not damaged, only not here yet: raises with the command that goes on
    if problems:
        raise IntegrityError(
            f"dataset `{name}` is damaged: {len(problems)} of {len(dataset.files)} files",
            cause="; ".join(problems),
            hint=dataset.again,
        )
    out.print(f"{len(dataset.files)} files, {size(dataset.bytes())}: all as recorded")
    out.result(
        {"name": name, "ok": True, "files": len(dataset.files), "bytes": dataset.bytes(), "sha256": dataset.sha256}
    )


@app.command()
def remove(name: Name, yes: Yes = False, json: Json = False) -> None:
    """Delete a dataset and its token caches from the disk.

    Asks first, and says which runs were trained on it: they keep their
    checkpoints, but cannot go on training without it.

    \b
    Examples:
      picollm data remove notes
      picollm data remove notes --yes
    """
    from picollm.data import removal

    out = Output(json)
    plan = removal.plan_removal(name)
    if plan.runs:
        runs = ", ".join(f"`{run}`" for run in plan.runs)
        out.warn(f"trained on it, and cannot go on training without it: {runs}")
    caches = f" and {len(plan.caches)} token cache{'s' if len(plan.caches) != 1 else ''} of it" if plan.caches else ""
    removed = out.confirm(f"delete dataset `{name}`{caches}, {size(plan.bytes)}?", yes=yes)
    if removed:
        removal.remove(plan)
    out.print(f"removed `{name}`: {size(plan.bytes)} are free again" if removed else "nothing was removed")
    out.result(
        {"name": name, "removed": removed, "bytes": plan.bytes, "path": str(plan.folder),
         "caches": [str(cache) for cache in plan.caches], "runs": list(plan.runs)}
    )  # fmt: skip


def _train_hint(dataset: Dataset) -> str:
    if dataset.kind == "text":
        # A run of its own: without `--run` the next dataset would meet this one's run.
        return (
            f"train on it with `picollm speedrun --preset cpu-small --run {dataset.name} "
            f"--set data.dataset={dataset.name}`"
        )
    return (
        f'fine-tune on it: put the lines `[[sft.mix]]` and `dataset = "{dataset.name}"` into a file `mix.toml`, '
        "then `picollm speedrun --run NAME --force sft --config mix.toml`"
    )


def _noun(kind: str) -> str:
    return "documents" if kind == "text" else "conversations"


def _counted(rows: int, kind: str) -> str:
    """`1 document`, `2,000 conversations`."""
    return f"{rows:,} {_noun(kind) if rows != 1 else _noun(kind)[:-1]}"


def _rows(dataset: Dataset, split: Split, *, noun: bool = False) -> str:
    """Rows of a split; of a download that is not complete, how many of its files are here."""
    if (rows := dataset.known_rows(split)) is None:
        files = len(dataset.of(split))
        return f"{files - len(dataset.missing(split)):,} of {files:,} files"
    return _counted(rows, dataset.kind) if noun else f"{rows:,}"


def _facts(rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="quiet", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(key), Text(value))
    return table


def _plain(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}: {part['text']}]" for part in content)


def _preview(text: str) -> str:
    """The beginning of a text; control characters are shown, not sent to the terminal."""
    shown = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text[:PREVIEW_CHARS])
    return shown if len(text) <= PREVIEW_CHARS else f"{shown}… ({len(text):,} characters)"
