"""Files of a user -> records, streaming: text, JSON lines, CSV and parquet, with the place of every fault.

Memory stays bounded by the largest single document (for parquet by a small batch of rows), not by the file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from picollm.data.conversations import Conversation, EmptyMessage
from picollm.data.cutting import cut
from picollm.data.datasets import Kind
from picollm.errors import ConfigError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CSV_SUFFIXES = (".csv",)
PARQUET_SUFFIXES = (".parquet",)
SUFFIXES = TEXT_SUFFIXES + JSONL_SUFFIXES + CSV_SUFFIXES + PARQUET_SUFFIXES
# About how much text there is in a byte of a packed file; used to guess the room that it needs.
UNPACKED = {".jsonl.gz": 6, ".jsonl.zst": 6, ".parquet": 4}
STDIN = Path("-")
MESSAGES = "messages"
_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 128


@dataclass(frozen=True)
class SourceFile:
    """A file to import.

    Attributes:
        label: its name relative to the path the user gave; independent of the machine.
    """

    path: Path
    label: str
    size: int


class Record(NamedTuple):
    """One row of the input, or the reason why it is left out.

    Attributes:
        row: a document or a conversation; None when rejected.
        place: `file` or `file:line`, for messages.
        done: bytes of the file read so far, about.
    """

    kind: Kind
    row: str | Conversation | None
    rejected: str | None
    place: str
    done: int


def suffix_of(path: Path) -> str | None:
    """The supported ending of a file name, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def find_files(paths: list[Path]) -> tuple[list[SourceFile], int]:
    """The files behind what a user named: folders are walked in sorted order, hidden files left out.

    Returns:
        The files, each once, and how many files inside folders were left out for their ending.

    Raises:
        ConfigError: a path does not exist, a named file has an ending that cannot be read, a folder has no usable file.
    """
    found: dict[Path, SourceFile] = {}
    skipped = 0
    for path in paths:
        if path.is_dir():
            inside = list(_walk(path))
            usable = [file for file in inside if suffix_of(file)]
            if not usable:
                raise ConfigError(
                    f"no usable file in `{path}`",
                    cause=f"none of its {len(inside)} files ends in {', '.join(SUFFIXES)}",
                    hint="name another folder, or rename text files to end in `.txt`",
                )
            skipped += len(inside) - len(usable)
            top = path.resolve().name
            labelled = [(file, f"{top}/{file.relative_to(path).as_posix()}") for file in usable]
        elif path.is_file():
            if suffix_of(path) is None:
                raise ConfigError(
                    f"cannot import `{path}`",
                    cause=f"its name does not end in {', '.join(SUFFIXES)}",
                    hint="rename it if it is text, or convert it",
                )
            labelled = [(path, path.name)]
        elif path.exists():
            raise ConfigError(f"cannot import `{path}`", cause="it is neither a file nor a folder")
        else:
            raise ConfigError(
                f"cannot import `{path}`", cause="it does not exist", hint="check the path; `ls` shows what is there"
            )
        for file, label in labelled:
            found.setdefault(file.resolve(), SourceFile(file, label, file.stat().st_size))
    return list(found.values()), skipped


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ConfigError(f"cannot read `{error.filename}`", cause=error.strerror) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def read_records(file: SourceFile, field: str) -> Iterator[Record]:
    """The records of one file.

    Args:
        field: the column or key with the text. Where it is absent and there is `messages`, rows are conversations.

    Raises:
        ConfigError: the file cannot be read as what its name says; names the file and, where there is one, the line.
    """
    suffix = suffix_of(file.path)
    try:
        if suffix in TEXT_SUFFIXES:
            yield from _read_text(file)
        elif suffix in JSONL_SUFFIXES:
            yield from _read_jsonl(file, field)
        elif suffix in CSV_SUFFIXES:
            yield from _read_csv(file, field)
        else:
            yield from _read_parquet(file, field)
    except OSError as error:
        raise ConfigError(f"cannot read `{file.path}`", cause=error.strerror or str(error)) from error


# -- plain text -------------------------------------------------------------------------------------------------------


def _read_text(file: SourceFile) -> Iterator[Record]:
    with open(file.path, "rb") as stream:
        for text in cut(_decode(stream, file.path)):
            yield _document(text, str(file.path), min(stream.tell(), file.size))


def _decode(stream: BinaryIO, path: Path) -> Iterator[str]:
    """UTF-8 in chunks, line ends as `\\n`, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, at_start = 0, True
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), done - held + error.start, error) from error
        done += len(chunk)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        yield newlines.decode(text, final=not chunk)
        if not chunk:
            return


# -- JSON lines -------------------------------------------------------------------------------------------------------


def _read_jsonl(file: SourceFile, field: str) -> Iterator[Record]:
    with open(file.path, "rb") as raw:
        lines = _unpacked(raw, file.path)
        number, done = 0, 0
        try:
            for number, line in enumerate(lines, 1):
                # Plain lines are counted: asking a buffered file for its place at every line costs a system call.
                done = raw.tell() if lines is not raw else done + len(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _parse_line(line, field, f"{file.path}:{number}", done)
        except (EOFError, zlib.error, gzip.BadGzipFile, _Torn) as error:
            raise ConfigError(
                f"cannot unpack `{file.path}`", cause=f"after line {number}: {error}", hint="get the file again"
            ) from error


class _Torn(Exception):
    """A zstd stream that cannot be unpacked to its end."""


def _unpacked(raw: BinaryIO, path: Path) -> Any:
    """Lines of bytes of a file that may be packed."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(raw), _CHUNK_BYTES)
    return raw


class _Zstandard(io.RawIOBase):
    """Unpacks with pyarrow, which is here anyway; the standard library cannot."""

    def __init__(self, raw: BinaryIO) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import pyarrow as pa

        try:
            data = self._stream.read(len(buffer))
        except (pa.ArrowException, OSError) as error:
            raise _Torn(first_line(error)) from error
        buffer[: len(data)] = data
        return len(data)


def _parse_line(line: bytes, field: str, place: str, done: int) -> Record:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error.start, error) from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(
            f"`{place}` is not JSON", cause=reason, hint="a `.jsonl` file has one JSON object on each line"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"`{place}` is not a JSON object",
            cause=f"it is a {type(value).__name__}",
            hint=f'each line must look like {{"{field}": "…"}} or {{"{MESSAGES}": […]}}',
        )
    if field in value:
        key = field
    elif MESSAGES in value:
        key = MESSAGES
    else:
        raise _no_field(f"`{place}` has no field `{field}`", "fields", list(value))
    if key == MESSAGES and not isinstance(value[key], str):
        return _conversation(value, place, done)
    if not isinstance(value[key], str):
        raise ConfigError(
            f"field `{key}` of `{place}` is not a string",
            cause=f"it is {json.dumps(value[key], ensure_ascii=False)[:80]}",
            hint="correct the line, or name another field with `--field NAME`",
        )
    return _document(value[key], place, done)


# -- CSV --------------------------------------------------------------------------------------------------------------

_LONGEST_CELL = 1 << 30


def _read_csv(file: SourceFile, field: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    with open(file.path, "rb") as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(lines, strict=True)
        try:
            if field not in (columns := rows.fieldnames or []):
                raise _no_field(f"`{file.path}` has no column `{field}`", "columns", list(columns))
            for row in rows:
                place, done = f"{file.path}:{rows.line_num}", min(raw.tell(), file.size)
                text = row[field]
                yield Record("text", None, "null", place, done) if text is None else _document(text, place, done)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{file.path}` after line `{rows.line_num}", error.start, error) from error
        except csv.Error as error:
            raise ConfigError(
                f"`{file.path}:{rows.line_num + 1}` is not CSV",
                cause=str(error),
                hint="the first line names the columns, and cells with commas or line ends stand in double quotes",
            ) from error


# -- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: SourceFile, field: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # No pre-buffering: a row group of gigabytes is then read page by page.
        parquet = pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_CHUNK_BYTES)
        with parquet:
            column, kind = _parquet_column(parquet.schema_arrow, field, file.path)
            number, total = 0, max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
                for cell in batch.column(0):
                    number += 1
                    place, done = f"{file.path}:{number}", file.size * number // total
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError as error:
                        raise _not_utf8(place, error.start, error) from error
                    if value is None:
                        yield Record(kind, None, "null", place, done)
                    elif kind == "text":
                        yield _document(value, place, done)
                    else:
                        yield _conversation({MESSAGES: value}, place, done)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ConfigError(
            f"`{file.path}` is not readable parquet", cause=first_line(error), hint="get the file again"
        ) from error


def _parquet_column(schema: Any, field: str, path: Path) -> tuple[str, Kind]:
    import pyarrow.types as types

    column = field if field in schema.names else MESSAGES
    if column not in schema.names:
        raise _no_field(f"`{path}` has no column `{field}`", "columns", schema.names)
    found = schema.field(column).type
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_string(found) or types.is_large_string(found) or types.is_string_view(found):
        return column, "text"
    if column == MESSAGES and (types.is_list(found) or types.is_large_list(found)):
        return column, "conversations"
    raise ConfigError(
        f"column `{column}` of `{path}` is not text",
        cause=f"its type is {found}",
        hint=f"name another with `--field NAME`; columns: {', '.join(schema.names)}",
    )


# -- rows -------------------------------------------------------------------------------------------------------------


def _document(text: str, place: str, done: int) -> Record:
    if not text.strip():
        return Record("text", None, "empty", place, done)
    if not _is_unicode(text):
        return Record("text", None, "invalid Unicode", place, done)
    if "\0" in text:
        return Record("text", None, "NUL bytes, so not text", place, done)
    return Record("text", text, None, place, done)


def _conversation(value: dict[str, Any], place: str, done: int) -> Record:
    try:
        conversation = Conversation.from_json(value)
    except EmptyMessage:
        return Record("conversations", None, "empty message", place, done)
    except ValueError as error:
        raise ConfigError(
            f"`{place}` is not a conversation",
            cause=str(error),
            hint="user and assistant take turns, after an optional system message, and the assistant ends",
        ) from error
    if not all(_is_unicode(part.text) for message in conversation.messages for part in message.parts):
        return Record("conversations", None, "invalid Unicode", place, done)
    return Record("conversations", conversation, None, place, done)


def _is_unicode(text: str) -> bool:
    r"""False for half a surrogate pair, which JSON can spell (`"\ud800"`) but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_utf8(place: str, offset: int, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(
        f"`{place}` is not UTF-8",
        cause=f"byte {offset} is 0x{error.object[error.start]:02x}: {error.reason}",
        hint="convert it, for instance with `iconv -f latin1 -t utf-8`, or leave it out",
    )


def _no_field(message: str, what: str, names: list[str]) -> ConfigError:
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    return ConfigError(message, cause=f"its {what} are: {shown or 'none'}", hint="name one with `--field NAME`")
