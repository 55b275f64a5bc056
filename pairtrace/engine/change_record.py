"""The change record of an edit: what was done to which row, and everything that is needed to undo it.

Parquet with one row per changed row of the data, in its order: `row`, `pair_id`, `source`, `action` ("filter", "swap"
or "drop-source"), `score` (null without one), `reason`, and `original`, the whole row where it was removed. The
metadata holds the settings of the edit, the exact schema of the original data, and digests (`row_digest`) of the rows
before and after the edit, by which `restore` tells that it gives the very same rows back. The edited data in turn holds
the SHA-256 of its change record. Records of schema version 1 have no digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairtrace.engine.edit_decision import KEEP, REMOVE, Decision, RankedRows
from pairtrace.engine.edited_rows import in_schema
from pairtrace.errors import DataFormatError

EDIT_KEY = b"pairtrace_edit"
SCHEMA_KEY = b"pairtrace_original_schema"
DIGESTS_KEY = b"pairtrace_digests"
RECORD_KEY = b"pairtrace_change_record"
SCHEMA_VERSION = 2
READABLE = (1, 2)
SWAPPED = "swap"
_BATCH_ROWS = 1024


def record_schema(original: pa.Schema, manifest: dict[str, Any]) -> pa.Schema:
    """Schema of a change record for data with the schema `original`."""
    fields: dict[str, pa.DataType] = {
        "row": pa.int64(),
        "pair_id": pa.string(),
        "source": pa.string(),
        "action": pa.string(),
        "score": pa.float32(),
        "reason": pa.string(),
        "original": pa.struct(list(original)),
    }
    metadata = {
        EDIT_KEY: json.dumps(manifest, sort_keys=True).encode(),
        SCHEMA_KEY: original.serialize().to_pybytes(),
    }
    return pa.schema([pa.field(name, kind) for name, kind in fields.items()]).with_metadata(metadata)


def record_batch(
    batch: pa.RecordBatch, start: int, change: np.ndarray, decision: Decision, ranked: RankedRows, schema: pa.Schema
) -> pa.RecordBatch:
    """The entries for the changed rows of one batch of the data.

    Args:
        batch: n rows of the data, before the edit.
        start: row number of the first.
        change: uint8 [n], as in `Decision.change`.
        decision: the edit.
        ranked: what the scores say.
        schema: of the change record.
    """
    places = np.flatnonzero(change != KEEP)
    rows = start + places
    scores = ranked.scores[rows]
    removed = change[places] == REMOVE
    actions = [decision.action if gone else SWAPPED for gone in removed.tolist()]
    original = pa.StructArray.from_arrays(batch.take(places).columns, fields=list(batch.schema))
    # A swap is undone by swapping again: only removed rows are kept.
    originals = pa.concat_arrays([original, pa.nulls(1, original.type)]).take(
        np.where(removed, np.arange(len(places)), len(places))
    )
    columns = [
        pa.array(rows),
        pa.array(ranked.pair_ids[rows], pa.string()),
        pa.array(decision.groups[rows], pa.string()),
        pa.array(actions, pa.string()),
        pa.array(scores, mask=np.isnan(scores)),
        pa.array([decision.reason] * len(rows), pa.string()),
        originals,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def file_metadata(path: str | Path, what: str = "") -> dict[bytes, bytes]:
    """The metadata of a parquet file, of its schema and of the file.

    Args:
        path: of the file.
        what: words before the path in messages.

    Raises:
        DataFormatError: there is no such file, it is no parquet, or its footer is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            return {**(file.metadata.metadata or {}), **(file.schema_arrow.metadata or {})}
    # Damaged names of columns are no valid UTF-8, which is a ValueError.
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataFormatError(f"cannot read {what}{path}: {error}") from error


@dataclass(frozen=True)
class ChangeRecord:
    """A change record, opened.

    Attributes:
        path: of the file.
        manifest: the settings of the edit.
        original_schema: schema of the data before the edit, metadata included.
        digests: of the rows, "original" and "edited"; None in a record of schema version 1.
    """

    path: str
    manifest: dict[str, Any]
    original_schema: pa.Schema
    digests: dict[str, str] | None

    @classmethod
    def open(cls, path: str | Path) -> ChangeRecord:
        """Read manifest and schema.

        Raises:
            DataFormatError: not a change record, damaged, or of another version.
        """
        metadata = file_metadata(path, "the change record ")
        if EDIT_KEY not in metadata or SCHEMA_KEY not in metadata:
            raise DataFormatError(f"{path} is not a change record of pairtrace edit; it ends in .changes.parquet")
        try:
            manifest = json.loads(metadata[EDIT_KEY])
            version, digests = manifest["schema_version"], None
            if version in READABLE:
                if not isinstance(manifest["columns"], dict) or not isinstance(manifest["rows_before"], int):
                    raise ValueError("its settings are not those of an edit")
                if version > 1:
                    found = json.loads(metadata[DIGESTS_KEY])
                    digests = {name: str(found[name]) for name in ("original", "edited")}
            schema = pa.ipc.read_schema(pa.py_buffer(metadata[SCHEMA_KEY]))
            if version in READABLE and not {manifest["columns"][side] for side in ("chosen", "rejected")} <= {
                *schema.names
            }:
                raise ValueError("its columns are not those of its settings")
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise DataFormatError(f"{path} is damaged: its metadata cannot be read: {error!r}") from error
        if version not in READABLE:
            raise DataFormatError(f"{path} has schema version {version!r}; expected one of {READABLE}")
        return cls(str(path), manifest, schema, digests)

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of all changed rows.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            return pq.read_table(self.path, columns=columns, page_checksum_verification=True)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error

    def originals(self) -> Iterator[pa.RecordBatch]:
        """The removed rows in order, as they were.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["action", "original"]):
                    removed = pc.not_equal(batch.column(0), pa.scalar(SWAPPED))
                    kept = batch.column(1).filter(removed)
                    assert isinstance(kept, pa.StructArray)
                    yield in_schema(pa.RecordBatch.from_struct_array(kept), self.original_schema)
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error
