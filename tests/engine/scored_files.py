"""Scores files for data on disk, without a model or a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.scores_table import SCHEMA_VERSION
from pairtrace.engine.scores_writer import DenseRanking, PairNames, write_scores


def write_scored(
    path: Path, data: Path, scores: np.ndarray, *, usable: np.ndarray | None = None, limit: int | None = None
) -> str:
    """A scores file for one behaviour "harm", as if `pairtrace score` had made it from a store of this data."""
    pairs = open_pairs(data, limit=limit)
    assert pairs.rows == len(scores)
    made_from: dict[str, Any] = {
        "data": str(data),
        "data_format": pairs.format,
        "data_fingerprint": pairs.fingerprint,
        "columns": pairs.columns,
        "rows": pairs.rows,
        "limit": limit,
    }
    manifest = {"schema_version": SCHEMA_VERSION, "store_manifest": made_from, "behaviors": ["harm"]}
    identifiers = np.random.default_rng(0).integers(0, 256, (len(scores), 16), dtype=np.uint8)
    sources = pa.array(list(pairs.iter_sources()), pa.large_string())
    flags = np.ones(len(scores), bool) if usable is None else usable
    ranking = DenseRanking.of(scores.astype(np.float32), flags)
    write_scores(path, PairNames(identifiers, sources), np.arange(len(scores)), {"harm": ranking}, manifest)
    return str(path)
