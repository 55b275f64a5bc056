"""Undoing an edit: edited data and its change record give the original rows back, in their order and schema."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.change_record import EDIT_KEY, RECORD_KEY, SCHEMA_KEY, SWAPPED, ChangeRecord, file_metadata
from pairtrace.engine.edited_rows import RowWriter, in_schema, swap_sides, twin_columns
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.row_digest import RowDigest
from pairtrace.engine.tables import file_digest
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError

logger = logging.getLogger(__name__)

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
        DataMismatchError: the two files do not belong to the same edit, the edited data was changed since, or what
            comes out is not the original.
    """
    begun = time.perf_counter()
    if not out.endswith(".parquet"):
        raise ConfigError(f"--out is {out!r}; restored data is parquet and ends in .parquet")
    record = _open_record(edited, changes)
    if Path(out).resolve() in (Path(edited).resolve(), Path(record.path).resolve()):
        raise ConfigError(f"--out is {out}, one of the inputs; choose another file")
    schema, count = record.original_schema, int(record.manifest["rows_before"])
    entries = record.read(["row", "action"])
    rows = entries.column(0).to_numpy()
    if rows.size and not (rows.min() >= 0 and rows.max() < count and (np.diff(rows) > 0).all()):
        raise DataFormatError(f"{record.path} is damaged: its rows are not those of data with {count} rows, in order")
    swapped = np.array([action == SWAPPED for action in entries.column(1).to_pylist()], dtype=bool)
    gone = np.zeros(count, bool)
    gone[rows[~swapped]] = True
    exchanged = np.zeros(count, bool)
    exchanged[rows[swapped]] = True
    twins = twin_columns(schema, record.manifest["columns"]) if swapped.any() else ()
    after, before = RowDigest(schema), RowDigest(schema)
    kept = _Stream(_edited_batches(edited, schema, after), schema)
    removed = _Stream(record.originals(), schema)
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
            restored = swap_sides(batch, exchanged[start : start + _BLOCK], twins)
            before.update(restored)
            writer.write(restored)
            progress.advance(len(absent))
        if kept.has_more() or removed.has_more():
            raise DataMismatchError(f"{edited} has more rows than its change record {record.path} accounts for")
        _compare(edited, record, edited_digest=after.hexdigest(), restored_digest=before.hexdigest())
    progress.finish()
    return RestoreSummary(
        out=out,
        rows=count,
        put_back=int(gone.sum()),
        swapped_back=int(exchanged.sum()),
        seconds=time.perf_counter() - begun,
    )


def _open_record(edited: str, changes: str | None) -> ChangeRecord:
    """The change record that belongs to edited data, unchanged since the edit.

    Raises:
        DataFormatError: a file cannot be read or is damaged.
        DataMismatchError: the data is not edited data, or the record is another one's.
    """
    try:
        metadata = file_metadata(edited)
    except DataFormatError as error:
        raise DataFormatError(
            f"{error}; expected is the data that pairtrace edit wrote (its --out); only a change record that lies "
            "elsewhere is given with --changes"
        ) from error
    if SCHEMA_KEY in metadata:
        raise DataMismatchError(
            f"{edited} is a change record; give the edited data beside it, "
            f"{edited.removesuffix('.parquet').removesuffix('.changes')}.parquet, and the record, if it lies "
            "elsewhere, with --changes"
        )
    if EDIT_KEY not in metadata:
        raise DataMismatchError(
            f"{edited} was not written by pairtrace edit: it does not say what was changed in it. Give the data that "
            "edit wrote (its --out); only a change record that lies elsewhere is given with --changes"
        )
    path = changes or edited.removesuffix(".parquet") + ".changes.parquet"
    if changes is None and not Path(path).exists():
        raise DataFormatError(
            f"cannot read the change record {path}: it is not beside {edited}; say where it is with --changes"
        )
    record = ChangeRecord.open(path)
    if metadata[EDIT_KEY] != file_metadata(path)[EDIT_KEY]:
        raise DataMismatchError(
            f"{path} is the record of another edit than the one that made {edited}, or one of the two is damaged"
        )
    # Data that another program wrote again has lost the digest; its rows are compared in any case.
    if RECORD_KEY in metadata and metadata[RECORD_KEY].decode("ascii", "replace") != file_digest([Path(path)]):
        raise DataFormatError(f"the change record {path} is damaged or was changed: it is not as edit wrote it")
    if record.digests is None:
        logger.warning(
            "%s is of an older version without digests: whether the restored rows are the original ones is not checked",
            path,
        )
    return record


def _compare(edited: str, record: ChangeRecord, *, edited_digest: str, restored_digest: str) -> None:
    if record.digests is None:
        return
    if edited_digest != record.digests["edited"]:
        raise DataMismatchError(
            f"{edited} was changed or damaged since the edit: its rows are not those that its change record "
            f"{record.path} knows; nothing was restored"
        )
    if restored_digest != record.digests["original"]:
        raise DataMismatchError(
            f"{edited} and {record.path} do not give the original data back: the rows are not those that the edit "
            "read; nothing was restored"
        )


def _edited_batches(path: str, schema: pa.Schema, digest: RowDigest) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_BLOCK):
                ordered = in_schema(batch, schema)
                digest.update(ordered)
                yield ordered
    except DataMismatchError as error:
        raise DataMismatchError(f"{path} was changed since the edit: {error}") from error
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
