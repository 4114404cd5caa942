"""Text from the command line and from stdin, which may hold bytes that are no UTF-8."""

from __future__ import annotations

import sys

from picollm.errors import ConfigError


def argument_text(text: str) -> str:
    """A text of the command line, where bytes that are no UTF-8 arrive as lone surrogates.

    Raises:
        ConfigError: it holds such bytes.
    """
    return utf8_text(text.encode("utf-8", "surrogateescape"))


def stdin_text() -> str:
    """All of stdin.

    Raises:
        ConfigError: it is not UTF-8.
    """
    return utf8_text(sys.stdin.buffer.read())


def utf8_text(data: bytes) -> str:
    """Bytes as text.

    Raises:
        ConfigError: they are not UTF-8; the first bad byte and its place are named.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the text is not UTF-8", cause=str(error), hint="convert it first, for example with `iconv -t utf-8`"
        ) from None
