"""The scores file: one row per pair of the data, in its order, whichever method made the scores.

Parquet with the columns `row`, `pair_id` (hex), `source`, then per behaviour `score:{behavior}`, `rank:{behavior}`
(1 is the highest) and `percentile:{behavior}`. A quarantined or missing pair has null scores; a pair without a
cosine has a NaN score; neither has a rank. Legend: N pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.errors import ConfigError, DataFormatError

METADATA_KEY = b"pairtrace"
ROW_GROUP = 65_536
SCHEMA_VERSION = 1
_COLUMNS: dict[str, pa.DataType] = {"row": pa.int64(), "pair_id": pa.string(), "source": pa.string()}


def _behavior_columns(name: str) -> dict[str, pa.DataType]:
    return {f"score:{name}": pa.float32(), f"rank:{name}": pa.int64(), f"percentile:{name}": pa.float32()}


def rank_rows(scores: np.ndarray) -> np.ndarray:
    """Ranks of float32 [N] scores, int64 [N]: 1 is the highest score, ties go by row, 0 stands for no score."""
    scored = np.flatnonzero(~np.isnan(scores))
    ranks = np.zeros(len(scores), np.int64)
    ranks[scored[np.argsort(-scores[scored], kind="stable")]] = np.arange(1, len(scored) + 1)
    return ranks


def write_scores(
    path: str | Path,
    identifiers: np.ndarray,
    sources: np.ndarray,
    scores: dict[str, np.ndarray],
    usable: np.ndarray,
    manifest: dict[str, Any],
) -> None:
    """Write a scores file row group by row group; it appears when it is complete.

    Args:
        path: of the parquet file.
        identifiers: uint8 [N, 16] content hashes.
        sources: object [N] of strings.
        scores: per behaviour float32 [N].
        usable: bool [N]; False where the pair has no activations (null score).
        manifest: how the scores were made; `behaviors` lists their names.

    Raises:
        ConfigError: the file cannot be written.
    """
    fields = dict(_COLUMNS)
    for name in scores:
        fields |= _behavior_columns(name)
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(manifest, sort_keys=True).encode()})
    ranks = {name: rank_rows(values) for name, values in scores.items()}
    ranked = {name: max(1, int((values > 0).sum())) for name, values in ranks.items()}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(usable), ROW_GROUP):
            span = slice(start, min(start + ROW_GROUP, len(usable)))
            columns: list[pa.Array[Any]] = [
                pa.array(np.arange(span.start, span.stop)),
                pa.array([identifier.tobytes().hex() for identifier in identifiers[span]], pa.string()),
                pa.array(sources[span], pa.string()),
            ]
            for name, values in scores.items():
                rank, count = ranks[name][span], ranked[name]
                percentile = (100.0 * (count - rank + 1) / count).astype(np.float32)
                columns += [
                    pa.array(values[span], mask=~usable[span]),
                    pa.array(rank, mask=rank == 0),
                    pa.array(percentile, mask=rank == 0),
                ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


@dataclass(frozen=True)
class ScoresTable:
    """A scores file.

    Attributes:
        path: of the file.
        manifest: how the scores were made.
        behaviors: names, in file order.
    """

    path: str
    manifest: dict[str, Any]
    behaviors: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> ScoresTable:
        """Read names and manifest.

        Raises:
            DataFormatError: not a scores file.
        """
        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataFormatError(f"cannot read the scores file {path}: {error}") from error
        metadata = (schema.metadata or {}).get(METADATA_KEY)
        behaviors = tuple(name.removeprefix("score:") for name in schema.names if name.startswith("score:"))
        expected = dict(_COLUMNS)
        for name in behaviors:
            expected |= _behavior_columns(name)
        wrong = [name for name, kind in expected.items() if name not in schema.names or schema.field(name).type != kind]
        if metadata is None or wrong or not behaviors:
            detail = f"; missing or of another type: {', '.join(wrong)}" if wrong else ""
            raise DataFormatError(
                f"{path} is not a scores file (columns {', '.join(schema.names)}){detail}; "
                "make one with pairtrace score"
            )
        try:
            manifest = json.loads(metadata)
        except ValueError as error:
            raise DataFormatError(f"{path} is not a scores file: its manifest is not valid JSON: {error}") from error
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if version != SCHEMA_VERSION:
            raise DataFormatError(
                f"{path} is not a scores file of this version: its schema version is {version!r}, expected "
                f"{SCHEMA_VERSION}; make it again with pairtrace score"
            )
        return cls(str(path), manifest, behaviors)

    def choose(self, behavior: str | None) -> str:
        """The behaviour of that name, or the only one.

        Raises:
            ConfigError: there is no such behaviour, or there are several and none was named.
        """
        if behavior is None and len(self.behaviors) == 1:
            return self.behaviors[0]
        if behavior not in self.behaviors:
            problem = "several behaviours are" if behavior is None else f"{behavior!r} is not"
            raise ConfigError(f"{problem} in {self.path}; choose one of: {', '.join(self.behaviors)}")
        return behavior

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns, all rows.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            return pq.read_table(self.path, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error

    def ranks(self, behavior: str) -> np.ndarray:
        """int64 [N]; 0 where the pair has no rank."""
        column = self.read([f"rank:{behavior}"]).column(0)
        filled = column.fill_null(pa.scalar(0, pa.int64()))
        return np.asarray(filled.to_numpy(), dtype=np.int64)
