"""What a user named -> the files to import, and the pieces of them that processes read side by side."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from picollm.errors import ConfigError
from picollm.files import disk_errors

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl",)
CSV_SUFFIXES = (".csv",)
PARQUET_SUFFIXES = (".parquet",)
PACKED_SUFFIXES = (".gz", ".zst")
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + CSV_SUFFIXES + PARQUET_SUFFIXES
# About how much text there is in a byte of a packed file; used to guess the room that it needs.
UNPACKED = {".gz": 6, ".zst": 6, ".parquet": 4}
STDIN = Path("-")
# A process is handed files of about so many bytes together, or so many of them, or a piece of a large one.
TASK_BYTES = 64 << 20
TASK_FILES = 500
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}


@dataclass(frozen=True)
class SourceFile:
    """A file to import.

    Attributes:
        label: its name relative to the path the user gave; independent of the machine.
        shown: its name in messages.
        size, changed_ns: when it was found; a file that is no longer so has changed under our hands.
    """

    path: Path
    label: str
    shown: str
    size: int
    changed_ns: int

    @classmethod
    def at(cls, path: Path, label: str, shown: str | None = None) -> SourceFile:
        found = path.stat()
        return cls(path, label, shown or str(path), found.st_size, found.st_mtime_ns)

    @property
    def suffix(self) -> str:
        """What is in it: `.jsonl` also of `a.jsonl.gz`."""
        return suffix_of(self.path) or ""

    @property
    def packing(self) -> str:
        """`.gz`, `.zst` or nothing."""
        return packing_of(self.path)

    def check_unchanged(self) -> None:
        """Raises ConfigError: it is not as it was when it was found, so its pieces may not fit together."""
        try:
            now = SourceFile.at(self.path, self.label)
        except OSError as error:
            raise ConfigError(f"cannot read `{self.shown}`", cause=error.strerror) from error
        if (now.size, now.changed_ns) != (self.size, self.changed_ns):
            raise ConfigError(
                f"`{self.shown}` changed while it was read", hint="wait until nothing writes to it, then import again"
            )


@dataclass(frozen=True)
class Piece:
    """A file or a part of one: what one process reads in one go.

    Attributes:
        number: of the file in the list of all.
        start, end: the lines that begin in these bytes, or row groups of parquet; None is the whole file.
        bytes: its share of the file's size.
    """

    number: int
    file: SourceFile
    bytes: int
    start: int = 0
    end: int | None = None


def packing_of(path: Path) -> str:
    name = path.name.lower()
    return next((packing for packing in PACKED_SUFFIXES if name.endswith(packing)), "")


def suffix_of(path: Path) -> str | None:
    """The supported ending of a file name, without that of its packing, or None."""
    packing = packing_of(path)
    name = path.name.lower().removesuffix(packing)
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if packing and suffix in PARQUET_SUFFIXES else suffix


def text_bytes(files: list[SourceFile]) -> int:
    """About how many bytes the rows of these files take."""
    return sum(file.size * UNPACKED.get(file.packing or file.suffix, 1) for file in files)


def find_files(paths: list[Path], scratch: Path) -> tuple[list[SourceFile], int]:
    """The files behind what a user named, each once, in an order that does not depend on how they were named.

    Folders are walked without hidden files and without following links to folders.

    Args:
        scratch: a folder of ours; standard input (`-`) is put there.

    Returns:
        The files, and how many things inside folders were left out for what they are or how their names end.

    Raises:
        ConfigError: a path does not exist, a named file has an ending that cannot be read, a folder has no usable file.
    """
    found: dict[Path, SourceFile] = {}
    skipped = 0
    for path in dict.fromkeys(paths):
        try:
            files, left_out = _find(path, scratch)
            skipped += left_out
            for file in files:
                real = file.path.resolve()
                # Named twice, by itself and by its folder: the same label wins in whatever order.
                if real not in found or file.label < found[real].label:
                    found[real] = file
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, to `resolve`
            raise ConfigError(
                f"cannot read `{getattr(error, 'filename', None) or path}`",
                cause=getattr(error, "strerror", None) or str(error),
            ) from error
    return sorted(found.values(), key=lambda file: (file.label, str(file.path))), skipped


def _find(path: Path, scratch: Path) -> tuple[list[SourceFile], int]:
    if path == STDIN:
        return [_spool_stdin(scratch)], 0
    if path.is_dir():
        inside = list(_walk(path))
        usable = [file for file in inside if suffix_of(file) and file.is_file()]
        if not usable:
            raise ConfigError(
                f"no usable file in `{path}`",
                cause=f"none of its {len(inside)} files ends in {', '.join(SUFFIXES)}",
                hint="name another folder, or rename text files to end in `.txt`",
            )
        top = path.resolve().name
        files = [SourceFile.at(file, f"{top}/{file.relative_to(path).as_posix()}") for file in usable]
        return files, len(inside) - len(usable)
    if path.is_file():
        if suffix_of(path) is None:
            raise ConfigError(
                f"cannot import `{path}`",
                cause=f"its name does not end in {', '.join(SUFFIXES)}",
                hint="rename it if it is text, or convert it",
            )
        return [SourceFile.at(path, path.name)], 0
    if os.path.lexists(path):
        raise ConfigError(
            f"cannot import `{path}`",
            cause="it is neither a file nor a folder" if path.exists() else "it is a link that leads nowhere",
            hint="a pipe can be read as standard input: `… | picollm data import NAME -`",
        )
    raise ConfigError(
        f"cannot import `{path}`", cause="it does not exist", hint="check the path; `ls` shows what is there"
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Everything that is not a folder."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link to a folder is not walked, which keeps loops out; it counts as left out.
        names += [name for name in folders if Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _spool_stdin(folder: Path) -> SourceFile:
    """Standard input as a file: JSON lines when it starts with `{`, else plain text."""
    if sys.stdin is None:
        raise ConfigError("cannot read standard input", cause="it is closed")
    stream = sys.stdin.buffer
    first = stream.read(1 << 16)
    for magic, what in _MAGIC.items():
        if first.startswith(magic):
            raise ConfigError(
                "cannot import standard input",
                cause=f"it is {what}, and only text and JSON lines can be piped in",
                hint="unpack it in the pipe, as in `zcat FILE | picollm data import NAME -`, or name the file itself",
            )
    is_json = first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    path = folder / ("stdin.jsonl" if is_json else "stdin.txt")
    with disk_errors(path), open(path, "wb") as file:
        file.write(first)
        shutil.copyfileobj(stream, file, 1 << 20)
    return SourceFile.at(path, path.name, "<stdin>")


# -- pieces -----------------------------------------------------------------------------------------------------------


def tasks_of(files: list[SourceFile]) -> list[list[Piece]]:
    """Work for processes: small files together, large ones in pieces where their format allows it."""
    tasks: list[list[Piece]] = []
    room = 0
    for number, file in enumerate(files):
        pieces = _pieces(number, file)
        if len(pieces) > 1:
            tasks += [[piece] for piece in pieces]
            room = 0
        elif room > 0 and len(tasks[-1]) < TASK_FILES:
            tasks[-1] += pieces
            room -= file.size
        else:
            tasks.append(pieces)
            room = TASK_BYTES - file.size
    return tasks


def _pieces(number: int, file: SourceFile) -> list[Piece]:
    if file.size > TASK_BYTES and not file.packing:
        if file.suffix in JSONL_SUFFIXES:
            starts = range(0, file.size, TASK_BYTES)
            ends = [min(start + TASK_BYTES, file.size) for start in starts]
            return [Piece(number, file, end - start, start, end) for start, end in zip(starts, ends, strict=True)]
        if file.suffix in PARQUET_SUFFIXES:
            return _row_groups(number, file)
    return [Piece(number, file, file.size)]


def _row_groups(number: int, file: SourceFile) -> list[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = [Piece(number, file, file.size)]
    try:
        metadata = pq.read_metadata(file.path)
    except (pa.ArrowException, OSError):
        return whole  # its reader says what is wrong
    count = metadata.num_row_groups
    sizes = [metadata.row_group(group).total_byte_size for group in range(count)]
    share = file.size / max(1, sum(sizes))
    pieces: list[Piece] = []
    start, held = 0, 0.0
    for group, size in enumerate(sizes):
        held += size * share
        if held >= TASK_BYTES or group == count - 1:
            pieces.append(Piece(number, file, round(held), start, group + 1))
            start, held = group + 1, 0.0
    return pieces if len(pieces) > 1 else whole
