"""Preference pairs out of whatever people keep them in, as a stream."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pairtrace.engine.formats import FORMATS, RowFormat
from pairtrace.engine.inputs import open_tables
from pairtrace.engine.pair import Message, Pair
from pairtrace.engine.recognition import recognise
from pairtrace.engine.row_batches import common_schema, read_batches
from pairtrace.engine.tables import Record, Table, Unreadable
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError

__all__ = ["Message", "Pair", "PairSource", "open_pairs"]

_SAMPLE_ROWS = 100


def open_pairs(
    data: str | Path,
    *,
    format: str | None = None,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    source: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> PairSource:
    """Open preference data and recognise its format.

    JSON files are parsed once from end to end, so that a damaged line is found before any work begins.

    Args:
        data: .jsonl or .json file (.gz as well), .parquet or .arrow file, a directory of such files, a directory
            written by `datasets.save_to_disk`, or a hub id.
        format: one of `pairtrace.engine.formats.FORMATS`; `None` to recognise it from the first rows.
        prompt: name of the prompt column; `None` for the usual name. The same goes for `chosen` and `rejected`.
        source: name of the column that says where a row comes from; `None` for one of the usual names, if present.
        split: split to read, where there are several.
        limit: number of rows to read from the beginning; `None` for all.

    Returns:
        The pairs, not yet read.

    Raises:
        ConfigError: `format`, `split` or `limit` is out of range.
        DataError: there is nothing at `data`.
        DataFormatError: empty or damaged files, missing columns, a format that is not recognised.
        MissingDependencyError: a hub id without the package `datasets`.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected at least 1")
    tables = [table for table in open_tables(data, split) if table.rows]
    if not tables:
        raise DataFormatError(f"{data} is empty: it holds no rows")
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    sample = [
        record
        for record in islice(tables[0].read(0, _SAMPLE_ROWS, tables[0].columns), limit)
        if not isinstance(record, Unreadable)
    ]
    row_format = recognise(
        columns,
        sample,
        name=str(data),
        format=format,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source=source,
    )
    for table in tables:
        missing = [column for column in row_format.needed if column not in table.columns]
        if missing:
            raise DataFormatError(
                f"{table.name} lacks the columns {', '.join(missing)}, which other files of {data} have; "
                f"columns found: {', '.join(table.columns)}"
            )
    return PairSource(tables, row_format, limit)


class PairSource:
    """Preference pairs that can be read in order, from any row on, or by row number.

    Attributes:
        rows: number of rows, at most the limit.
        available: number of rows, whatever the limit.
        format: name of the format.
        columns: column read for `prompt`, `chosen`, `rejected` and `source`; `None` where there is none.
    """

    def __init__(self, tables: Sequence[Table], row_format: RowFormat, limit: int | None) -> None:
        self._tables = tables
        self._starts = [0]
        for table in tables:
            self._starts.append(self._starts[-1] + table.rows)
        self._format = row_format
        self.available = self._starts[-1]
        self._fingerprint: str | None = None
        self.rows = self.available if limit is None else min(limit, self.available)
        self.format = row_format.name
        self.columns = row_format.columns

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the content of all files in order, the format and the columns, not the limit."""
        if self._fingerprint is None:
            identity = {
                "content": [table.digest() for table in self._tables],
                "format": self.format,
                "columns": self.columns,
                "names": [table.name for table in self._tables] if self._source_is_name else None,
            }
            self._fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    @property
    def _source_is_name(self) -> bool:
        return self._format.source is None and len(self._tables) > 1

    def describe(self) -> str:
        """One line that says what was recognised."""
        rows = f"{self.rows:,} rows"
        if self.rows < self.available:
            rows = f"first {self.rows:,} of {self.available:,} rows"
        sides = ", ".join(name for name in (self._format.prompt, self._format.chosen, self._format.rejected) if name)
        if self._format.source is not None:
            source = f"source column {self._format.source}"
        else:
            source = "source is the file name" if self._source_is_name else "no source column"
        return f"{self.format}: {FORMATS[self.format]}; {rows}; columns {sides}; {source}"

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Pair]:
        """Read pairs in order; one call for a long stretch is cheaper than many calls.

        Args:
            start: first row.
            stop: row behind the last one; `None` for the end of the data.

        Raises:
            DataFormatError: a file is damaged or changed since it was opened.
        """
        for row, record, source in self._records(start, self.rows if stop is None else stop, self._format.needed):
            yield self._pair(row, record, source)

    def take(self, rows: Sequence[int]) -> list[Pair]:
        """The pairs in the given rows, in the given order; only the blocks that hold them are read.

        Raises:
            DataMismatchError: a row is not in the data.
        """
        wanted = sorted({int(row) for row in rows})
        for row in wanted[:1] + wanted[-1:]:
            if not 0 <= row < self.rows:
                raise DataMismatchError(f"row {row} was asked for, but the data has the rows 0 to {self.rows - 1}")
        found: dict[int, Pair] = {}
        for _, block in groupby(wanted, key=self._block):
            members = set(block)
            for row, record, source in self._records(min(members), max(members) + 1, self._format.needed):
                if row in members:
                    found[row] = self._pair(row, record, source)
        return [found[int(row)] for row in rows]

    def iter_sources(self) -> Iterator[str]:
        """The source of every row, in order, as `Pair.source` has it."""
        for _, record, source in self._records(0, self.rows, [self._format.source or self._format.chosen]):
            yield source if isinstance(record, Unreadable) else self._format.source_of(record, source)

    def schema(self) -> pa.Schema:
        """Every column of the data with its type; reads all rows where the files are JSON.

        Raises:
            DataFormatError: the values of a column do not go together.
        """
        return common_schema(self._tables)

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows of the data in order, those beyond the limit as well, with every column.

        Raises:
            DataFormatError: a file is damaged or changed since it was opened.
        """
        return read_batches(self._tables, schema)

    def _pair(self, row: int, record: Record, source: str) -> Pair:
        if isinstance(record, Unreadable):
            return Pair(row, None, "", "", source, problem=record.reason)
        return self._format.normalise(row, record, source)

    def _records(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, Record, str]]:
        """Row number, record and default source of the rows from `start` up to `stop`."""
        stop = min(stop, self.rows)
        for table, first in zip(self._tables, self._starts, strict=False):
            if first + table.rows <= start or first >= stop:
                continue
            source = Path(table.name).name if len(self._tables) > 1 else ""
            row = max(start, first)
            for record in table.read(row - first, stop - first, columns):
                yield row, record, source
                row += 1

    def _block(self, row: int) -> tuple[int, Any]:
        """Table and block of a row."""
        table = bisect_right(self._starts, row) - 1
        return table, bisect_right(self._tables[table].block_starts, row - self._starts[table])
