"""The change record of an edit: what was done to which row, and everything that is needed to undo it.

Parquet with one row per changed row of the data, in its order: `row`, `pair_id`, `source`, `action` ("filter", "swap"
or "drop-source"), `score` (null without one), `reason`, and `original`, the whole row where it was removed. The
metadata holds the settings of the edit and the exact schema of the original data.
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
from pairtrace.errors import DataFormatError

EDIT_KEY = b"pairtrace_edit"
SCHEMA_KEY = b"pairtrace_original_schema"
SCHEMA_VERSION = 1
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


@dataclass(frozen=True)
class ChangeRecord:
    """A change record, opened.

    Attributes:
        path: of the file.
        manifest: the settings of the edit.
        original_schema: schema of the data before the edit, metadata included.
    """

    path: str
    manifest: dict[str, Any]
    original_schema: pa.Schema

    @classmethod
    def open(cls, path: str | Path) -> ChangeRecord:
        """Read manifest and schema.

        Raises:
            DataFormatError: not a change record, or of another version.
        """
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"cannot read the change record {path}: {error}") from error
        if EDIT_KEY not in metadata or SCHEMA_KEY not in metadata:
            raise DataFormatError(f"{path} is not a change record of pairtrace edit; it ends in .changes.parquet")
        manifest = json.loads(metadata[EDIT_KEY])
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise DataFormatError(
                f"{path} has schema version {manifest.get('schema_version')!r}; expected {SCHEMA_VERSION}"
            )
        return cls(str(path), manifest, pa.ipc.read_schema(pa.py_buffer(metadata[SCHEMA_KEY])))

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of all changed rows.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            return pq.read_table(self.path, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error

    def originals(self) -> Iterator[pa.RecordBatch]:
        """The removed rows in order, as they were.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["action", "original"]):
                    removed = pc.not_equal(batch.column(0), pa.scalar(SWAPPED))
                    kept = batch.column(1).filter(removed)
                    assert isinstance(kept, pa.StructArray)
                    originals = pa.RecordBatch.from_struct_array(kept)
                    yield pa.RecordBatch.from_arrays(originals.columns, schema=self.original_schema)
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error
