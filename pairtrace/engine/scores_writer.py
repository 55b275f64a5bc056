"""Writing the scores file; its format is described in `scores_table`.

Legend: N pairs, M rows of the file (N, or fewer where only the best are kept), n rows of a part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.scores_table import FILE_COLUMNS, METADATA_KEY, behavior_columns
from pairtrace.store.read_ahead import ahead
from pairtrace.store.reader import ActivationStore

ROW_GROUP = 65_536
# Scores in a row group, over all behaviours: what bounds the memory of writing very wide files.
_ROW_GROUP_SCORES = 1 << 23
_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), np.uint16)


def rank_rows(scores: np.ndarray) -> np.ndarray:
    """Ranks of float32 [N] scores, int64 [N]: 1 is the highest score, ties go by row, 0 stands for no score."""
    scored = np.flatnonzero(~np.isnan(scores))
    assert len(scores) <= 1 << 32
    # One plain sort of integers is several times faster than a stable sort of floats: the bits of a float, turned so
    # that the highest score becomes the smallest number, above the row. Adding zero makes -0 and 0 the same bits.
    bits = (scores[scored] + np.float32(0)).view(np.uint32)
    descending = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = (descending.astype(np.uint64) << np.uint64(32)) | scored.astype(np.uint64)
    keys.sort()
    ranks = np.zeros(len(scores), np.int64)
    ranks[(keys & np.uint64(0xFFFFFFFF)).astype(np.int64)] = np.arange(1, len(scored) + 1)
    return ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingPart:
    """Some rows of one behaviour.

    Attributes:
        scores: float32 [n].
        absent: bool [n], rows whose score is null.
        ranks: int64 [n], 0 for null.
        ranked: number of all rows that have a rank, in the file or not.
    """

    scores: np.ndarray
    absent: np.ndarray
    ranks: np.ndarray
    ranked: int

    def columns(self) -> list[pa.Array[Any]]:
        """Score, rank and percentile."""
        unranked = self.ranks == 0
        percentiles = (100.0 * (self.ranked - self.ranks + 1) / max(1, self.ranked)).astype(np.float32)
        return [
            pa.array(self.scores, mask=self.absent),
            pa.array(self.ranks, mask=unranked),
            pa.array(percentiles, mask=unranked),
        ]


class Ranking(Protocol):
    """Scores and ranks of one behaviour over the M rows of the file."""

    def part(self, start: int, stop: int) -> RankingPart:
        """Those of the rows [start, stop) of the file."""


@dataclass(frozen=True, eq=False)
class DenseRanking:
    """Every row has its place: scores float32 [N], usable bool [N] (False: null), ranks int64 [N], ranked rows."""

    scores: np.ndarray
    usable: np.ndarray
    ranks: np.ndarray
    ranked: int

    @classmethod
    def of(cls, scores: np.ndarray, usable: np.ndarray) -> DenseRanking:
        """Rank scores float32 [N]; a pair that is not usable has a null score."""
        ranks = rank_rows(scores)
        return cls(scores, usable, ranks, int(ranks.max(initial=0)))

    def part(self, start: int, stop: int) -> RankingPart:
        """See `Ranking`."""
        span = slice(start, stop)
        return RankingPart(
            scores=self.scores[span], absent=~self.usable[span], ranks=self.ranks[span], ranked=self.ranked
        )


@dataclass(frozen=True, eq=False)
class SparseRanking:
    """Few rows have a score: positions int64 [m] in the file, ascending, with scores and ranks [m]; ranked rows."""

    positions: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    ranked: int

    @classmethod
    def of(cls, positions: np.ndarray, scores: np.ndarray, *, ranked: int) -> SparseRanking:
        """From positions and scores [m], best first."""
        order = np.argsort(positions)
        return cls(positions[order], scores[order], order + 1, ranked)

    def part(self, start: int, stop: int) -> RankingPart:
        """See `Ranking`."""
        first, last = np.searchsorted(self.positions, (start, stop)).tolist()
        places = self.positions[first:last] - start
        scores, ranks = np.zeros(stop - start, np.float32), np.zeros(stop - start, np.int64)
        scores[places], ranks[places] = self.scores[first:last], self.ranks[first:last]
        return RankingPart(scores=scores, absent=ranks == 0, ranks=ranks, ranked=self.ranked)


@dataclass(frozen=True, eq=False)
class PairNames:
    """What a scores file says of each pair besides its row.

    Attributes:
        identifiers: uint8 [N, 16] content hashes.
        sources: string [N].
    """

    ARRAYS: ClassVar = ("pair_id", "source")  # of the store

    identifiers: np.ndarray
    sources: pa.Array[Any]

    @classmethod
    def read(cls, store: ActivationStore) -> PairNames:
        """Those of a store.

        Raises:
            StoreDamagedError: a chunk is damaged.
        """
        offsets, data = store.source_strings()
        return cls(store.pair_ids(), arrow_strings(pa.large_string(), offsets, data))

    def columns(self, rows: np.ndarray) -> list[pa.Array[Any]]:
        """Row, pair_id (hex) and source of some rows, int64 [n], ascending, n > 0."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            identifiers, sources = self.identifiers[first : last + 1], self.sources.slice(first, len(rows))
        else:
            identifiers, sources = self.identifiers[rows], self.sources.take(pa.array(rows))
        offsets = np.arange(0, 32 * (len(rows) + 1), 32, dtype=np.int32)
        # Unlike indexing, take without a check of bounds lets other threads run.
        digits = np.take(_HEX, identifiers, mode="clip")
        return [pa.array(rows), arrow_strings(pa.string(), offsets, digits), sources.cast(pa.string())]


def arrow_strings(kind: pa.DataType, offsets: Any, data: Any) -> pa.Array[Any]:
    """Arrow strings over existing memory: an array of offsets [n + 1] in the width of the type, and one of bytes."""
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def write_scores(
    path: str | Path,
    names: PairNames,
    rows: np.ndarray,
    rankings: Mapping[str, Ranking],
    manifest: dict[str, Any],
) -> None:
    """Write a scores file row group by row group; it appears when it is complete.

    Args:
        path: of the parquet file.
        names: of all N pairs.
        rows: int64 [M], the rows of the file, ascending.
        rankings: of each behaviour over these rows.
        manifest: how the scores were made; `behaviors` lists their names.

    Raises:
        ConfigError: the file cannot be written.
    """
    fields = dict(FILE_COLUMNS)
    for name in rankings:
        fields |= behavior_columns(name)
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(manifest, sort_keys=True).encode()})
    group = max(1, min(ROW_GROUP, _ROW_GROUP_SCORES // len(rankings)))

    def batch(start: int) -> pa.RecordBatch:
        stop = min(start + group, len(rows))
        columns = names.columns(rows[start:stop])
        for ranking in rankings.values():
            columns += ranking.part(start, stop).columns()
        return pa.record_batch(columns, schema=schema)

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **_ENCODING) as writer:
        # The next row group is put together while one is encoded.
        for _, part in ahead(range(0, len(rows), group), batch, count=1, threads=1):
            writer.write_batch(part)


# Hashes, scores and ranks hardly ever repeat: dictionaries and compressors would take longer than the scoring, for a
# tenth of the size.
_ENCODING: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": ["source"],
    "column_encoding": {"row": "DELTA_BINARY_PACKED"},
    "write_statistics": ["row", "source"],
}
