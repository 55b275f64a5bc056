"""Scores of a baseline as an ordinary scores file, which `top`, `sources`, `edit` and `diagnose` read like any other.

Legend: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.scores_table import SCHEMA_VERSION
from pairtrace.engine.scores_writer import DenseRanking, PairNames, write_scores
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError
from pairtrace.store.layout import OK, QUARANTINED
from pairtrace.store.reader import ActivationStore


@dataclass(frozen=True, kw_only=True)
class BaselineScores:
    """What a baseline's scores file holds; `rows = scored + quarantined + unscored`, by the first behaviour.

    Attributes:
        out: the scores file.
        method: that made the scores.
        behaviors: names of the score columns.
        rows: N.
        scored: rows with a score.
        quarantined: rows that the store quarantined.
        unscored: other rows that the method gave no score.
    """

    out: str
    method: str
    behaviors: tuple[str, ...]
    rows: int
    scored: int
    quarantined: int
    unscored: int

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        return asdict(self)


def require_parquet(out: str | Path) -> None:
    """Check the name of a scores file before any work begins.

    Raises:
        ConfigError: it is not called .parquet.
    """
    if not str(out).endswith(".parquet"):
        raise ConfigError(f"--out is {str(out)!r}; scores files are parquet and end in .parquet")


def write_baseline(
    store: ActivationStore,
    out: str | Path,
    scores: Mapping[str, np.ndarray],
    *,
    method: str,
    details: Mapping[str, Any],
) -> BaselineScores:
    """Write the scores file of a baseline; a higher score says that the pair teaches the behaviour more.

    Args:
        store: whose pairs are ranked; complete.
        out: parquet file to write.
        scores: float32 [N] of each behaviour, at least one. A score that is not finite is missing and becomes null, as
            does that of a quarantined pair, whatever it is here; neither has a rank.
        method: "gradient", "judge", "random", "length", "margin", ...
        details: how the scores were made, plain JSON values; kept in the manifest.

    Raises:
        ConfigError: the file cannot be written.
    """
    require_parquet(out)
    status = store.status()
    usable = {name: (status == OK) & np.isfinite(values) for name, values in scores.items()}
    assert usable and all(len(values) == store.rows for values in scores.values())
    first = next(iter(usable.values()))
    quarantined = int((status == QUARANTINED).sum())
    result = BaselineScores(
        out=str(out),
        method=method,
        behaviors=tuple(scores),
        rows=store.rows,
        scored=int(first.sum()),
        quarantined=quarantined,
        unscored=store.rows - quarantined - int(first.sum()),
    )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "details": dict(details),
        "store": store.path if "://" in store.path else str(Path(store.path).absolute()),
        "store_manifest": store.manifest.to_json(),
        "behaviors": list(scores),
        "counts": {name: getattr(result, name) for name in ("rows", "scored", "quarantined", "unscored")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    rankings = {
        name: DenseRanking.of(np.where(usable[name], values, np.nan).astype(np.float32), usable[name])
        for name, values in scores.items()
    }
    write_scores(out, PairNames.read(store), np.arange(store.rows), rankings, manifest)
    return result
