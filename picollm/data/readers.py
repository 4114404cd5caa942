"""Files of a user -> records, streaming: text, JSON lines, CSV and parquet, with the place of every fault.

Memory stays bounded by the largest single document (for parquet by a small batch of rows), not by the file.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from picollm.data.conversations import Conversation, EmptyMessage
from picollm.data.cutting import cut
from picollm.data.dataset_record import Kind
from picollm.data.packed import CHUNK_BYTES, Unpacked
from picollm.data.sources import CSV_SUFFIXES, JSONL_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES, Piece, SourceFile
from picollm.errors import ConfigError, first_line

MESSAGES = "messages"
# Rows of parquet that are decoded together: so many, or as many as make so many bytes.
_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20
# A cell of CSV takes four times its characters while it is read; an open quote would swallow a whole file.
_LONGEST_CELL = 1 << 27


class Record(NamedTuple):
    """One row of the input, or the reason why it is left out.

    Attributes:
        row: a document or a conversation; None when rejected.
        number: of the line or row in its piece, from 1; `place` makes words of it.
        done: bytes of the piece read so far, about.
    """

    kind: Kind
    row: str | Conversation | None
    rejected: str | None
    number: int
    done: int


def place(piece: Piece, number: int) -> str:
    """`file:line` or `file:row` for messages; plain text has no rows.

    Where a piece starts in the middle of a file, what comes before is counted only now.
    """
    file = piece.file
    if file.suffix in TEXT_SUFFIXES:
        return file.shown
    if piece.start and file.suffix in JSONL_SUFFIXES:
        with open(file.path, "rb") as stream:
            left = _first_line_start(stream, piece.start)
            stream.seek(0)
            while left:
                chunk = stream.read(min(left, CHUNK_BYTES))
                number += chunk.count(b"\n")
                left = left - len(chunk) if chunk else 0
    elif piece.start:
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(file.path)
        number += sum(metadata.row_group(group).num_rows for group in range(piece.start))
    return f"{file.shown}:{number}"


def read_records(piece: Piece, field: str) -> Iterator[Record]:
    """The records of a file or of a part of it.

    Args:
        field: the column or key with the text. Where it is absent and there is `messages`, rows are conversations.

    Raises:
        ConfigError: the file cannot be read as what its name says; names the file and, where there is one, the line.
    """
    suffix = piece.file.suffix
    try:
        if suffix in PARQUET_SUFFIXES:
            yield from _read_parquet(piece, field)
            return
        with open(piece.file.path, "rb") as raw:
            stream = Unpacked(raw, piece.file)
            if suffix in TEXT_SUFFIXES:
                yield from _read_text(stream)
            elif suffix in JSONL_SUFFIXES:
                yield from _read_jsonl(stream, piece, field)
            else:
                assert suffix in CSV_SUFFIXES
                yield from _read_csv(stream, piece, field)
    except OSError as error:
        raise ConfigError(f"cannot read `{piece.file.shown}`", cause=error.strerror or str(error)) from error


# -- plain text -------------------------------------------------------------------------------------------------------


def _read_text(stream: Unpacked) -> Iterator[Record]:
    for number, text in enumerate(cut(_decode(stream)), 1):
        yield _document(text, number, stream.done)


def _decode(stream: Unpacked) -> Iterator[str]:
    """UTF-8 in chunks, line ends as `\\n`, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, at_start = 0, True
    while True:
        chunk = stream.read(CHUNK_BYTES) or b""
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(stream.file.shown, done - held + error.start, error) from error
        done += len(chunk)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        yield newlines.decode(text, final=not chunk)
        if not chunk:
            return


# -- JSON lines -------------------------------------------------------------------------------------------------------


def _first_line_start(stream: BinaryIO, start: int) -> int:
    """Where the first line begins that does not begin before `start`."""
    stream.seek(start - 1)
    while (part := stream.readline(CHUNK_BYTES)) and not part.endswith(b"\n"):
        pass
    return stream.tell()


def _read_jsonl(stream: Unpacked, piece: Piece, field: str) -> Iterator[Record]:
    lines = stream.buffered()
    at = _first_line_start(lines, piece.start) if piece.start else 0
    for number in itertools.count(1):
        # A line belongs to the piece in which it begins.
        if piece.end is not None and at >= piece.end:
            return
        if not (line := lines.readline()):
            return
        at += len(line)
        if number == 1 and not piece.start:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        # Lines of a plain file are counted: asking it for its place every time costs a system call.
        yield _parse_line(line, field, piece, number, stream.done if piece.file.packing else at - piece.start)


def _parse_line(line: bytes, field: str, piece: Piece, number: int, done: int) -> Record:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(place(piece, number), error.start, error) from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(
            f"`{place(piece, number)}` is not JSON",
            cause=reason,
            hint="a `.jsonl` file has one JSON object on each line",
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"`{place(piece, number)}` is not a JSON object",
            cause=f"it is a {type(value).__name__}",
            hint=f'each line must look like {{"{field}": "…"}} or {{"{MESSAGES}": […]}}',
        )
    if field in value:
        key = field
    elif MESSAGES in value:
        key = MESSAGES
    else:
        raise _no_field(f"`{place(piece, number)}` has no field `{field}`", "fields", list(value))
    if key == MESSAGES and not isinstance(value[key], str):
        return _conversation(value, piece, number, done)
    if not isinstance(value[key], str):
        raise ConfigError(
            f"field `{key}` of `{place(piece, number)}` is not a string",
            cause=f"it is {json.dumps(value[key], ensure_ascii=False)[:80]}",
            hint="correct the line, or name another field with `--field NAME`",
        )
    return _document(value[key], number, done)


# -- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(stream: Unpacked, piece: Piece, field: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = io.TextIOWrapper(stream.buffered(), encoding="utf-8-sig", newline="")
    rows = csv.reader(lines, strict=True)
    at = 1
    try:
        names = next(rows, [])
        if not names:
            return
        if field not in names:
            raise _no_field(f"`{piece.file.shown}` has no column `{field}`", "columns", names)
        column = names.index(field)
        at = rows.line_num + 1
        for row in rows:
            if len(row) > column:
                yield _document(row[column], at, stream.done)
            elif row:
                yield Record("text", None, "too few cells", at, stream.done)
            at = rows.line_num + 1
    except UnicodeDecodeError as error:
        # The file is decoded ahead of its rows, so only about where is known.
        raise _not_utf8(f"{piece.file.shown}` after line `{at - 1}", None, error) from error
    except csv.Error as error:
        raise ConfigError(
            f"`{place(piece, at)}` is not CSV",
            cause=str(error),
            hint="the first line names the columns, and cells with commas or line ends stand in double quotes",
        ) from error
    finally:
        lines.detach()


# -- parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(piece: Piece, field: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = piece.file
    try:
        # No pre-buffering: a row group of gigabytes is then read page by page.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=CHUNK_BYTES) as parquet:
            column, kind = _parquet_column(parquet.schema_arrow, field, file)
            groups = range(piece.start, parquet.num_row_groups if piece.end is None else piece.end)
            found = [parquet.metadata.row_group(group) for group in groups]
            number, total = 0, max(1, sum(group.num_rows for group in found))
            row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in found), default=1)
            size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
            for batch in parquet.iter_batches(size, row_groups=list(groups), columns=[column], use_threads=False):
                for cell in batch.column(0):
                    number += 1
                    done = piece.bytes * number // total
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError as error:
                        raise _not_utf8(place(piece, number), error.start, error) from error
                    if value is None:
                        yield Record(kind, None, "null", number, done)
                    elif kind == "text":
                        yield _document(value, number, done)
                    else:
                        yield _conversation({MESSAGES: value}, piece, number, done)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise
        raise ConfigError(
            f"`{file.shown}` is not readable parquet", cause=first_line(error), hint="get the file again"
        ) from error


def _parquet_column(schema: Any, field: str, file: SourceFile) -> tuple[str, Kind]:
    import pyarrow.types as types

    column = field if field in schema.names else MESSAGES
    if column not in schema.names:
        raise _no_field(f"`{file.shown}` has no column `{field}`", "columns", schema.names)
    found = schema.field(column).type
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_string(found) or types.is_large_string(found) or types.is_string_view(found):
        return column, "text"
    if column == MESSAGES and (types.is_list(found) or types.is_large_list(found)):
        return column, "conversations"
    raise ConfigError(
        f"column `{column}` of `{file.shown}` is not text",
        cause=f"its type is {found}",
        hint=f"name another with `--field NAME`; columns: {', '.join(schema.names)}",
    )


# -- rows -------------------------------------------------------------------------------------------------------------


def _document(text: str, number: int, done: int) -> Record:
    # The text may be large: nothing here copies it but the look for half surrogates, and that only where one may be.
    rejected = "empty" if not text or text.isspace() else _unusable(text)
    return Record("text", None if rejected else text, rejected, number, done)


def _conversation(value: dict[str, Any], piece: Piece, number: int, done: int) -> Record:
    try:
        conversation = Conversation.from_json(value)
    except EmptyMessage:
        return Record("conversations", None, "empty message", number, done)
    except ValueError as error:
        raise ConfigError(
            f"`{place(piece, number)}` is not a conversation",
            cause=str(error),
            hint="user and assistant take turns, after an optional system message, and the assistant ends",
        ) from error
    reasons = (_unusable(part.text) for message in conversation.messages for part in message.parts)
    rejected = next((reason for reason in reasons if reason), None)
    return Record("conversations", None if rejected else conversation, rejected, number, done)


def _unusable(text: str) -> str | None:
    r"""Why text cannot be trained on. Half a surrogate pair can be spelt in JSON (`"\ud800"`) but not in UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "invalid Unicode"
    return "NUL bytes, so not text" if "\0" in text else None


def _not_utf8(where: str, offset: int | None, error: UnicodeDecodeError) -> ConfigError:
    byte = "a byte" if offset is None else f"byte {offset}"
    return ConfigError(
        f"`{where}` is not UTF-8",
        cause=f"{byte} is 0x{error.object[error.start]:02x}: {error.reason}",
        hint="convert it, for instance with `iconv -f latin1 -t utf-8`, or leave it out",
    )


def _no_field(message: str, what: str, names: list[str]) -> ConfigError:
    shown = ", ".join(names[:30]) + (", …" if len(names) > 30 else "")
    return ConfigError(message, cause=f"its {what} are: {shown or 'none'}", hint="name one with `--field NAME`")
