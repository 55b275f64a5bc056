"""Parquet files, and Arrow files as `datasets.save_to_disk` writes them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.tables import BATCH_ROWS, Record, Unreadable, file_digest
from pairtrace.errors import DataFormatError

_BUFFER = 1 << 20


class ParquetTable:
    """One parquet file; only the columns and row groups that are asked for are read.

    Raises:
        DataFormatError: the file is not readable parquet.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                self.schema = file.schema_arrow
                self.rows: int = file.metadata.num_rows
                sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise DataFormatError(f"{self.name}: not a readable parquet file: {error}") from error
        self.columns = tuple(self.schema.names)
        self.block_starts: Sequence[int] = _starts(sizes)

    def digest(self) -> str:
        """SHA-256 of the bytes of the file, in hex."""
        return file_digest([self._path])

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The rows from `start` up to `stop`, with the given columns.

        Raises:
            DataFormatError: a row group is damaged.
        """
        stop = min(stop, self.rows)
        if start >= stop:
            return
        first = bisect_right(self.block_starts, start) - 1
        last = bisect_right(self.block_starts, stop - 1) - 1
        try:
            # Without pre-buffering and with a small buffer, one huge row group does not have to fit in memory.
            with pq.ParquetFile(self._path, pre_buffer=False, buffer_size=_BUFFER) as file:
                batches = file.iter_batches(
                    BATCH_ROWS, row_groups=list(range(first, last + 1)), columns=list(columns), use_threads=False
                )
                yield from _window(batches, self.block_starts[first], start, stop)
        except (pa.ArrowException, OSError) as error:
            raise DataFormatError(f"{self.name}: rows {start} to {stop - 1} are damaged: {error}") from error

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows with all columns, in Arrow.

        Raises:
            DataFormatError: a row group is damaged.
        """
        try:
            with pq.ParquetFile(self._path, pre_buffer=False, buffer_size=_BUFFER) as file:
                yield from file.iter_batches(BATCH_ROWS, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise DataFormatError(f"{self.name} is damaged: {error}") from error


class ArrowTable:
    """Arrow files in order, stream or file format, memory-mapped.

    Raises:
        DataFormatError: a file is not readable Arrow.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name = name
        self._paths = paths
        self.schema = pa.schema([])
        sizes: list[int] = []
        for batch in self.batches():
            self.schema = batch.schema
            sizes.append(batch.num_rows)
        self.columns = tuple(self.schema.names)
        self.rows = sum(sizes)
        self.block_starts: Sequence[int] = _starts(sizes)

    def digest(self) -> str:
        """SHA-256 of the bytes of the files, in hex."""
        return file_digest(self._paths)

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The rows from `start` up to `stop`, with the given columns."""
        wanted = list(columns)
        yield from _window((batch.select(wanted) for batch in self.batches()), 0, start, stop)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All batches, as views of the mapped files: those that are passed over cost nothing."""
        for path in self._paths:
            try:
                with pa.memory_map(str(path)) as source:
                    if source.read(6) == b"ARROW1":
                        file = pa.ipc.open_file(source)
                        yield from (file.get_batch(index) for index in range(file.num_record_batches))
                    else:
                        source.seek(0)
                        yield from pa.ipc.open_stream(source)
            except (pa.ArrowException, OSError) as error:
                raise DataFormatError(f"{path}: not a readable Arrow file: {error}") from error


def saved_dataset(directory: Path) -> ArrowTable:
    """The table in a directory that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        DataFormatError: the directory's `state.json` does not list its files.
    """
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFormatError(f"{directory}: state.json does not list the data files: {error}") from error
    return ArrowTable(str(directory), [directory / name for name in names])


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _window(batches: Iterator[pa.RecordBatch], row: int, start: int, stop: int) -> Iterator[Record]:
    """The rows from `start` up to `stop` of batches that begin at `row`."""
    for batch in batches:
        if row >= stop:
            return
        skipped = max(0, start - row)
        if skipped < batch.num_rows:
            yield from batch_records(batch.slice(skipped, stop - row - skipped))
        row += batch.num_rows


def batch_records(batch: pa.RecordBatch | pa.Table) -> Iterator[Record]:
    """The rows of a batch; Arrow does not check text, so a row may turn out not to be UTF-8."""
    for first in range(0, batch.num_rows, BATCH_ROWS):
        part = batch.slice(first, BATCH_ROWS)
        try:
            yield from part.to_pylist()
        except UnicodeDecodeError:
            yield from (_single_record(part.slice(index, 1)) for index in range(part.num_rows))


def _single_record(row: pa.RecordBatch | pa.Table) -> Record:
    try:
        record: Record = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unreadable(f"the text is not valid UTF-8 ({error.reason})")
    return record
