"""Batches of rows with some removed or their sides exchanged, and the parquet files they go to.

Legend: n rows of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.errors import ConfigError, DataMismatchError

ROW_GROUP_ROWS = 16_384
# Long conversations: a row group is closed earlier, so that memory stays bounded.
ROW_GROUP_BYTES = 64 << 20


class RowWriter:
    """A parquet file written row group by row group, used as a context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pq.ParquetWriter(path, schema, write_page_checksum=True)
        self._held: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        if not batch.num_rows:
            return
        self._held.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.get_total_buffer_size()
        if self._rows >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def annotate(self, entries: Mapping[str, str]) -> None:
        """Add entries to the metadata of the file, beside those of the schema."""
        self._writer.add_key_value_metadata(dict(entries))

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held, self.schema), row_group_size=ROW_GROUP_ROWS)
        self._held, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._writer.close()


def twin_columns(schema: pa.Schema, columns: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """Columns that trade places when a pair is swapped: the sides, and what is said of each side.

    Beside the two sides, columns are twins when their names differ only in "chosen" and "rejected" (score_chosen and
    score_rejected, chosen-model and rejected-model): swapped text with unswapped ratings would contradict itself.

    Args:
        schema: of the data.
        columns: role of each column, as `PairSource.columns`.

    Raises:
        ConfigError: twins have different types.
    """
    chosen, rejected = columns["chosen"], columns["rejected"]
    assert chosen is not None and rejected is not None
    twins = [(chosen, rejected)]
    for name in schema.names:
        other = re.sub("chosen", "rejected", name)
        if other != name and other in schema.names and (name, other) not in twins:
            twins.append((name, other))
    for one, other in twins:
        first, second = schema.field(one).type, schema.field(other).type
        if first != second:
            raise ConfigError(
                f"pairs cannot be swapped: column {one!r} has type {first}, but {other!r} has {second}; use --filter"
            )
    return tuple(twins)


def swap_sides(batch: pa.RecordBatch, swap: np.ndarray, twins: Sequence[tuple[str, str]]) -> pa.RecordBatch:
    """Exchange the twin columns of some rows.

    Args:
        batch: n rows.
        swap: bool [n].
        twins: as from `twin_columns`.
    """
    if not swap.any():
        return batch
    here, there = np.arange(batch.num_rows), np.arange(batch.num_rows) + batch.num_rows
    columns = list(batch.columns)
    for one, other in twins:
        places = batch.schema.get_field_index(one), batch.schema.get_field_index(other)
        both = pa.concat_arrays([batch.column(places[0]), batch.column(places[1])])
        columns[places[0]] = both.take(np.where(swap, there, here))
        columns[places[1]] = both.take(np.where(swap, here, there))
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def keep_rows(batch: pa.RecordBatch, keep: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    """Some rows of a batch, under a schema that differs in its metadata only.

    Args:
        batch: n rows.
        keep: bool [n].
        schema: of the result.
    """
    kept = batch if keep.all() else batch.filter(pa.array(keep))
    return pa.RecordBatch.from_arrays(kept.columns, schema=schema)


def in_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch out of a file under the schema that its rows had before; parquet keeps some types as a wider one.

    Raises:
        DataMismatchError: it has other columns, or values that do not fit.
    """
    if batch.schema.names != schema.names:
        raise DataMismatchError(f"the columns are {', '.join(batch.schema.names)}; expected {', '.join(schema.names)}")
    try:
        columns = [
            column if column.type == field.type else column.cast(field.type)
            for column, field in zip(batch.columns, schema, strict=True)
        ]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataMismatchError(f"the columns have other types than before the edit: {error}") from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)
