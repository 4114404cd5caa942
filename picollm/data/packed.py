"""The bytes of a file that may be packed with gzip or zstd."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

from picollm.data.sources import SourceFile
from picollm.errors import ConfigError, first_line

CHUNK_BYTES = 1 << 20


class Unpacked(io.RawIOBase):
    """The bytes of a file that may be packed, and how much of the file they took.

    Raises ConfigError, from any read: the packing is damaged or cut.
    """

    def __init__(self, raw: BinaryIO, file: SourceFile) -> None:
        self.file, self._raw = file, raw
        self._stream: Any = raw
        if file.packing == ".gz":
            self._stream = gzip.GzipFile(fileobj=raw)
        elif file.packing == ".zst":
            import pyarrow as pa  # which is here anyway; the standard library cannot unpack it

            self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        self._unpacked = 0

    @property
    def done(self) -> int:
        return min(self._raw.tell(), self.file.size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            if not self.file.packing or error.errno:
                raise
            raise self._damaged(first_line(error)) from error
        self._unpacked += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _damaged(self, cause: str) -> ConfigError:
        return ConfigError(
            f"cannot unpack `{self.file.shown}`",
            cause=f"after {self._unpacked:,} bytes of text: {cause}",
            hint="get the file again",
        )

    def buffered(self) -> BinaryIO:
        """For reading lines. A file that is not packed is read directly, which is faster."""
        return io.BufferedReader(self, CHUNK_BYTES) if self.file.packing else self._raw
