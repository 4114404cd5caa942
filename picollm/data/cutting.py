"""Long plain text -> documents of a useful size."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A plain file above the first size is cut; pieces end at the first blank line after the second.
WHOLE_FILE_CHARS = 16_000
PIECE_CHARS = 4_000
# It ends with a line end, so that the indentation of what follows stays with it.
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def cut(chunks: Iterator[str]) -> Iterator[str]:
    """Documents of a plain-text stream: all of it up to 16 000 characters, else pieces of about 4 000.

    A piece ends at the first blank line after 4 000 characters. Where none comes within 16 000 it ends at a line end,
    or at a space, or in the middle of a word, so that memory stays bounded. Pieces lose the white space after them. The
    result does not depend on how the stream was chunked.
    """
    held, whole = "", True
    for chunk in chunks:
        held += chunk
        if len(held) <= WHOLE_FILE_CHARS:
            continue
        whole, start = False, 0
        while len(held) - start > WHOLE_FILE_CHARS:
            end = _piece_end(held, start)
            yield held[start:end].lstrip("\n").rstrip()
            start = end
        held = held[start:]
    if whole:
        yield held
        return
    start = 0
    while start < len(held):
        end = _piece_end(held, start) if len(held) - start > PIECE_CHARS else len(held)
        yield held[start:end].lstrip("\n").rstrip()
        start = end


def _piece_end(text: str, start: int) -> int:
    limit = start + WHOLE_FILE_CHARS
    if blank := _BLANK_LINES.search(text, start + PIECE_CHARS, limit):
        return blank.end()
    if len(text) <= limit:
        return len(text)
    for separator in ("\n", " "):
        if (at := text.rfind(separator, start + PIECE_CHARS, limit)) >= 0:
            return at + 1
    return limit
