"""Undoing an edit: edited data and its change record give the original rows back, in their order and schema."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.change_record import EDIT_KEY, SWAPPED, ChangeRecord
from pairtrace.engine.edited_rows import RowWriter, swap_sides, twin_columns
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError

_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class RestoreSummary:
    """What `restore` did.

    Attributes:
        out: the file written.
        rows: rows in it.
        put_back: rows that the edit had removed.
        swapped_back: rows that the edit had swapped.
        seconds: wall time.
    """

    out: str
    rows: int
    put_back: int
    swapped_back: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def restore(edited: str, out: str, changes: str | None = None, progress: Progress = NULL_PROGRESS) -> RestoreSummary:
    """Write the data as it was before an edit.

    Args:
        edited: parquet file that `edit` wrote.
        out: parquet file to write.
        changes: the change record; None for the one beside `edited`.
        progress: receives one stage, counted in pairs.

    Raises:
        ConfigError: `out` cannot be written or is one of the inputs.
        DataFormatError: a file is damaged or is not what `edit` writes.
        DataMismatchError: the two files do not belong to the same edit.
    """
    begun = time.perf_counter()
    record = ChangeRecord.open(changes or edited.removesuffix(".parquet") + ".changes.parquet")
    if out in (edited, record.path):
        raise ConfigError(f"--out is {out}, one of the inputs; choose another file")
    _require_same_edit(edited, record)
    schema, count = record.original_schema, int(record.manifest["rows_before"])
    entries = record.read(["row", "action"])
    rows = entries.column(0).to_numpy()
    swapped = np.array([action == SWAPPED for action in entries.column(1).to_pylist()], dtype=bool)
    gone = np.zeros(count, bool)
    gone[rows[~swapped]] = True
    exchanged = np.zeros(count, bool)
    exchanged[rows[swapped]] = True
    twins = twin_columns(schema, record.manifest["columns"]) if swapped.any() else ()
    kept, removed = _Stream(_edited_batches(edited, schema), schema), _Stream(record.originals(), schema)
    progress.start("restore", count, "pairs")
    with replacing(out) as path, RowWriter(path, schema) as writer:
        for start in range(0, count, _BLOCK):
            absent = gone[start : start + _BLOCK]
            present = int(np.count_nonzero(~absent))
            both = pa.concat_arrays([kept.pull(present), removed.pull(len(absent) - present)])
            order = np.empty(len(absent), np.int64)
            order[~absent] = np.arange(present)
            order[absent] = np.arange(present, len(absent))
            ordered = both.take(order)
            assert isinstance(ordered, pa.StructArray)
            batch = pa.RecordBatch.from_arrays(pa.RecordBatch.from_struct_array(ordered).columns, schema=schema)
            writer.write(swap_sides(batch, exchanged[start : start + _BLOCK], twins))
            progress.advance(len(absent))
        if kept.has_more() or removed.has_more():
            raise DataMismatchError(f"{edited} has more rows than its change record {record.path} accounts for")
    progress.finish()
    return RestoreSummary(
        out=out,
        rows=count,
        put_back=int(gone.sum()),
        swapped_back=int(exchanged.sum()),
        seconds=time.perf_counter() - begun,
    )


def _require_same_edit(edited: str, record: ChangeRecord) -> None:
    try:
        metadata = pq.read_schema(edited).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise DataFormatError(f"cannot read {edited}: {error}") from error
    if EDIT_KEY not in metadata:
        raise DataMismatchError(f"{edited} was not written by pairtrace edit: it does not say what was changed in it")
    if metadata[EDIT_KEY] != (pq.read_schema(record.path).metadata or {})[EDIT_KEY]:
        raise DataMismatchError(f"{record.path} is the record of another edit than the one that made {edited}")


def _edited_batches(path: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BLOCK):
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)
    except (OSError, pa.ArrowException) as error:
        raise DataFormatError(f"{path} is damaged: {error}") from error


class _Stream:
    """Rows out of a stream of batches, any number at a time."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> None:
        self._batches = batches
        self._rest = pa.array([], pa.struct(list(schema)))

    def pull(self, count: int) -> pa.Array[Any]:
        """The next rows.

        Raises:
            DataMismatchError: there are fewer.
        """
        parts = [self._rest]
        held = len(self._rest)
        while held < count:
            batch = next(self._batches, None)
            if batch is None:
                raise DataMismatchError(f"{count - held} rows that the change record accounts for are not there")
            parts.append(batch.to_struct_array())
            held += batch.num_rows
        joined = pa.concat_arrays(parts)
        self._rest = joined.slice(count)
        return joined.slice(0, count)

    def has_more(self) -> bool:
        """Whether rows are left."""
        return len(self._rest) > 0 or any(batch.num_rows for batch in self._batches)
