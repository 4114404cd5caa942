"""Random access to the texts in the parquet shards of a dataset."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

from picollm.errors import IntegrityError, first_line

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

    from picollm.data.dataset_record import ShardFile

CACHED_ROW_GROUPS = 4
# Far fewer than a process may have open, however many shards there are.
OPEN_FILES = 64


class Documents(Sequence[str]):
    """The texts of one split by global row number; a few row groups stay decoded.

    Reading a row whose page fails its checksum raises IntegrityError: damaged bytes are never taken for text.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[ShardFile],
        damaged: Callable[[ShardFile, str], IntegrityError],
        *,
        column: str = "text",
    ) -> None:
        """Nothing is opened before the first row is asked for.

        Args:
            folder: where the shards are.
            files: those of the split, in order, with their rows.
            damaged: makes the error for a shard that cannot be read, from the shard and the cause.
            column: holds the text; a null in it reads as an empty text.
        """
        self._folder, self._files, self._damaged, self._column = folder, files, damaged, column
        self._cache: OrderedDict[int, pyarrow.Array] = OrderedDict()
        self._open: OrderedDict[int, pyarrow.parquet.ParquetFile] = OrderedDict()
        self._num_rows = sum(file.rows or 0 for file in files)

    def __len__(self) -> int:
        return self._num_rows

    @cached_property
    def _layout(self) -> tuple[list[tuple[int, int]], list[int]]:
        """(file, row group inside it) of every row group, in order, and the global row at which each starts."""
        groups, sizes = [], []
        for index in range(len(self._files)):
            metadata = self._parquet(index).metadata
            for group in range(metadata.num_row_groups):
                groups.append((index, group))
                sizes.append(metadata.row_group(group).num_rows)
        return groups, list(accumulate(sizes, initial=0))[:-1]

    @property
    def _groups(self) -> list[tuple[int, int]]:
        return self._layout[0]

    @property
    def _starts(self) -> list[int]:
        return self._layout[1]

    def _parquet(self, index: int) -> pyarrow.parquet.ParquetFile:
        if index in self._open:
            self._open.move_to_end(index)
        else:
            import pyarrow.parquet

            file = self._files[index]
            path = self._folder / file.name
            try:
                if path.stat().st_size != file.bytes:  # a file may be opened again long after it was looked at
                    raise self._damaged(file, f"its size is no longer the {file.bytes:,} bytes of its record")
                parquet = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            except (pyarrow.ArrowException, OSError) as error:
                raise self._damaged(file, f"it is not readable parquet: {first_line(error)}") from error
            if parquet.metadata.num_rows != file.rows or self._column not in parquet.schema_arrow.names:
                raise self._damaged(file, f"it does not hold the {file.rows:,} rows of its record")
            self._open[index] = parquet
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[index]

    def _read_group(self, group: int) -> pyarrow.Array:
        import pyarrow

        index, inside = self._groups[group]
        try:
            table = self._parquet(index).read_row_group(inside, columns=[self._column], use_threads=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(self._files[index], f"row group {inside}: {first_line(error)}") from error
        return table.column(0).combine_chunks()

    def _text(self, group: int, value: pyarrow.Scalar) -> str:
        try:
            return value.as_py() or ""
        except UnicodeDecodeError as error:
            raise self._damaged(self._files[self._groups[group][0]], str(error)) from error

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The text of a row; negative numbers count from the end.

        Raises:
            IndexError: there is no such row.
            IntegrityError: the file cannot be read.
        """
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = bisect_right(self._starts, row) - 1
        if group in self._cache:
            self._cache.move_to_end(group)
        else:
            self._cache[group] = self._read_group(group)
            if len(self._cache) > CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        return self._text(group, self._cache[group][row - self._starts[group]])

    def __iter__(self) -> Iterator[str]:
        """Every text in order, one row group in memory at a time."""
        for group in range(len(self._groups)):
            for value in self._read_group(group):
                yield self._text(group, value)
