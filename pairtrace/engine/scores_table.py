"""The scores file: one row per pair of the data, in its order, whichever method made the scores.

Parquet with the columns `row`, `pair_id` (hex), `source`, then per behaviour `score:{behavior}`, `rank:{behavior}`
(1 is the highest) and `percentile:{behavior}`. A quarantined or missing pair has null scores; a pair without a
cosine has a NaN score; neither has a rank.

A file made with `--keep-top k` has only the rows that are among the k best of some behaviour; a behaviour is null in
the other rows. Ranks and percentiles are those among all pairs. Its manifest says `keep_top`, and under `summaries` how
the scores of all pairs are distributed. Legend: N pairs.
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

from pairtrace.errors import ConfigError, DataFormatError

METADATA_KEY = b"pairtrace"
# Of a file with all rows, and of one with the best only, which older readers must not take for the former.
SCHEMA_VERSION, TOP_SCHEMA_VERSION = 1, 2
FILE_COLUMNS: dict[str, pa.DataType] = {"row": pa.int64(), "pair_id": pa.string(), "source": pa.string()}


def behavior_columns(name: str) -> dict[str, pa.DataType]:
    """Columns of one behaviour."""
    return {f"score:{name}": pa.float32(), f"rank:{name}": pa.int64(), f"percentile:{name}": pa.float32()}


def _unreadable(path: Path, error: Exception) -> str:
    """What was given instead of a scores file, in words."""
    advice = "expected is the .parquet file that pairtrace score or pairtrace baseline wrote"
    if (path / "zarr.json").is_file():
        return f"{path} is an activation store, not a scores file; {advice} for it"
    if path.is_dir():
        return f"{path} is a directory, not a scores file; {advice}"
    if path.is_file():
        with path.open("rb") as stream:
            parquet = stream.read(4) == b"PAR1"
        if not parquet:
            return f"{path} is not a scores file: it is not even parquet; {advice}"
    return f"cannot read the scores file {path}: {error}"


@dataclass(frozen=True)
class ScoresTable:
    """A scores file.

    Attributes:
        path: of the file.
        manifest: how the scores were made.
        behaviors: names, in file order.
        keep_top: best rows of each behaviour that the file holds; None for a file with all rows.
    """

    path: str
    manifest: dict[str, Any]
    behaviors: tuple[str, ...]
    keep_top: int | None = None

    @classmethod
    def open(cls, path: str | Path, *, allow_top: bool = False) -> ScoresTable:
        """Read names and manifest.

        Args:
            path: of the file.
            allow_top: accept a file that holds only the best rows of each behaviour.

        Raises:
            DataFormatError: not a scores file.
            ConfigError: the file holds only the best rows and `allow_top` is False.
        """
        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataFormatError(_unreadable(Path(path), error)) from error
        metadata = (schema.metadata or {}).get(METADATA_KEY)
        behaviors = tuple(name.removeprefix("score:") for name in schema.names if name.startswith("score:"))
        expected = dict(FILE_COLUMNS)
        for name in behaviors:
            expected |= behavior_columns(name)
        types = dict(zip(schema.names, schema.types, strict=True))
        wrong = [name for name, kind in expected.items() if types.get(name) != kind]
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
        keep_top = manifest.get("keep_top") if version == TOP_SCHEMA_VERSION else None
        if version != SCHEMA_VERSION and not isinstance(keep_top, int):
            raise DataFormatError(
                f"{path} is not a scores file of this version: its schema version is {version!r}, expected "
                f"{SCHEMA_VERSION}; make it again with pairtrace score"
            )
        if keep_top is not None and not allow_top:
            raise ConfigError(
                f"{path} holds only the top {keep_top} rows of each behaviour (it was made with --keep-top), but all "
                "rows are needed here; score again without --keep-top"
            )
        return cls(str(path), manifest, behaviors, keep_top)

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
        """Some columns, all rows of the file.

        Raises:
            DataFormatError: the file is damaged.
        """
        try:
            return pq.read_table(self.path, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(f"{self.path} is damaged: {error}") from error

    def ranks(self, behavior: str) -> np.ndarray:
        """int64 [rows of the file]; 0 where the pair has no rank."""
        column = self.read([f"rank:{behavior}"]).column(0)
        filled = column.fill_null(pa.scalar(0, pa.int64()))
        return np.asarray(filled.to_numpy(), dtype=np.int64)
