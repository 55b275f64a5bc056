"""The scoring stage: cosine of every pair of a store with every behaviour.

Legend: N pairs, D width, K directions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.atomic import require_writable
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.directions import DIRECTION_SUFFIXES, Direction
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.score_blocks import Scorer, local_scores
from pairtrace.engine.score_cluster import cluster_scores
from pairtrace.engine.score_directions import select_directions
from pairtrace.engine.score_tally import AllScores, Tally, TopScores
from pairtrace.engine.scores_table import SCHEMA_VERSION, TOP_SCHEMA_VERSION
from pairtrace.engine.scores_writer import PairNames, write_scores
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError
from pairtrace.store.layout import MISSING, OK, QUARANTINED
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `score` does.

    Attributes:
        store: path of the activation store.
        directions: direction files (or plain .npy and .safetensors), at least one.
        out: parquet file to write.
        layer: residual layer; None takes the deepest one that the store and every behaviour have.
        allow_incomplete: score the finished rows of a store that still misses some.
        checksum: compare the checksum of every shard that is read.
        keep_top: keep only this many of the best rows of each behaviour, so that the scores of all rows with all
            behaviours never exist; None keeps all.
        scheduler: address of a Dask scheduler whose workers score the shards; None scores them here.
    """

    store: str
    directions: tuple[str, ...]
    out: str
    layer: int | None = None
    allow_incomplete: bool = False
    checksum: bool = True
    keep_top: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if not self.directions:
            raise ConfigError("no direction file was given; expected at least one")
        if not self.out.endswith(".parquet"):
            raise ConfigError(f"--out is {self.out!r}; scores files are parquet and end in .parquet")
        if self.keep_top is not None and self.keep_top < 1:
            raise ConfigError(f"--keep-top is {self.keep_top}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class BehaviorScores:
    """Scores of one behaviour, over all rows.

    Attributes:
        name: of the behaviour.
        kind: "vector" or "bank".
        directions: K.
        mean, lowest, highest: over the rows with a score; None if there are none.
        undefined: rows with activations but without a cosine (zero or not finite).
        top_row: row of the highest score, or None.
    """

    name: str
    kind: str
    directions: int
    mean: float | None
    lowest: float | None
    highest: float | None
    undefined: int
    top_row: int | None


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """What a scoring run did; `rows = scored + quarantined + undefined + missing`.

    Attributes:
        out: the scores file.
        layer: the layer that was used.
        rows: N.
        kept: rows in the scores file.
        scored: rows with a score.
        quarantined: rows that the store quarantined.
        undefined: rows whose vector is zero or not finite; their score is NaN.
        missing: rows that the store does not have yet.
        behaviors: one entry per behaviour.
        seconds: wall time.
        rows_per_second: N / seconds.
    """

    out: str
    layer: int
    rows: int
    kept: int
    scored: int
    quarantined: int
    undefined: int
    missing: int
    behaviors: tuple[BehaviorScores, ...]
    seconds: float
    rows_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def score(config: ScoreConfig, progress: Progress = NULL_PROGRESS) -> ScoreSummary:
    """Score a store against behaviours and write the scores file.

    Raises:
        DirectionError: a direction has another width, model or tokenizer than the store, unusable values, or a name
            twice.
        LayerError: no layer is common to the store and the behaviours.
        StoreError: the store cannot be read, or is incomplete and `allow_incomplete` is False.
        ConfigError: the scores file cannot be written, or the cluster cannot be used.
        MissingDependencyError: `scheduler` without Dask.
    """
    # What would fail after the scoring fails before it.
    require_writable(config.out)
    _refuse_swapped(config)
    with CostMeter(method="activation", stage="score", device="cpu", path=costs_path(config.out)) as meter:
        if config.scheduler is not None:
            # What its workers spend is not measured here.
            meter.extra["scheduler"] = config.scheduler
        return _score(config, meter, progress)


def _refuse_swapped(config: ScoreConfig) -> None:
    if Path(config.store).is_file() and Path(config.store).suffix in DIRECTION_SUFFIXES:
        store = next((path for path in config.directions if Path(path).is_dir()), None)
        if store is not None:
            raise ConfigError(
                f"the arguments are swapped: {config.store} is a direction file and {store} a directory; the "
                f"activation store comes first: pairtrace score {store} {config.store}"
            )


def _score(config: ScoreConfig, meter: CostMeter, progress: Progress) -> ScoreSummary:
    begun = time.perf_counter()
    store = ActivationStore.open(config.store, allow_incomplete=config.allow_incomplete)
    layer, directions = select_directions(store, config.directions, config.layer)
    status = store.status()
    usable = status == OK
    tally: Tally = (
        AllScores(len(directions), usable)
        if config.keep_top is None
        else TopScores(len(directions), usable, config.keep_top)
    )
    # Small files, asked for meanwhile: waiting for the disk one by one would take as long as reading a large part.
    # They are decoded afterwards, while the scores are ranked, since the kernels use every core.
    with ThreadPoolExecutor(1, thread_name_prefix="pairtrace-names") as pool:
        pool.submit(store.prefetch, PairNames.ARRAYS)
        _run(_blocks(config, store, layer, directions), tally, usable, progress)
        reading = pool.submit(PairNames.read, store)
        rankings = {direction.name: tally.ranking(column) for column, direction in enumerate(directions)}
        names = reading.result()
    statistics = [tally.statistics(column) for column in range(len(directions))]
    rows = tally.rows()
    counts = {
        "rows": store.rows,
        "kept": len(rows),
        "scored": statistics[0].scored,
        "quarantined": int((status == QUARANTINED).sum()),
        "undefined": statistics[0].undefined,
        "missing": int((status == MISSING).sum()),
    }
    write_scores(config.out, names, rows, rankings, _manifest(config, store, layer, directions, counts, tally))
    # A dot product of each row with each direction, and the row's own norm.
    meter.add(flops=2.0 * store.rows * store.width * (1 + sum(len(direction.values) for direction in directions)))
    seconds = time.perf_counter() - begun
    return ScoreSummary(
        out=config.out,
        layer=layer,
        **counts,
        behaviors=tuple(
            BehaviorScores(
                name=direction.name,
                kind=direction.kind,
                directions=len(direction.values),
                mean=found.mean,
                lowest=found.lowest,
                highest=found.highest,
                undefined=found.undefined,
                top_row=found.top_row,
            )
            for direction, found in zip(directions, statistics, strict=True)
        ),
        seconds=seconds,
        rows_per_second=store.rows / seconds,
    )


def _blocks(
    config: ScoreConfig, store: ActivationStore, layer: int, directions: Sequence[Direction]
) -> Iterator[tuple[int, np.ndarray]]:
    scorer = Scorer.of(directions, store.manifest.dtype)
    if config.scheduler is None:
        return local_scores(store, layer, scorer, checksum=config.checksum)
    return cluster_scores(config.scheduler, store, layer, scorer, checksum=config.checksum)


def _run(blocks: Iterator[tuple[int, np.ndarray]], tally: Tally, usable: np.ndarray, progress: Progress) -> None:
    progress.start("score", len(usable), "pairs")
    for start, block in blocks:
        # Whatever the rows of a quarantined pair hold, it has no score.
        block[~usable[start : start + len(block)]] = np.nan
        tally.add(start, block)
        progress.advance(len(block))
    progress.finish()


def _manifest(
    config: ScoreConfig,
    store: ActivationStore,
    layer: int,
    directions: Sequence[Direction],
    counts: dict[str, int],
    tally: Tally,
) -> dict[str, Any]:
    summaries = {direction.name: tally.summary(column) for column, direction in enumerate(directions)}
    best = {} if tally.keep_top is None else {"keep_top": tally.keep_top, "summaries": summaries}
    return {
        "schema_version": SCHEMA_VERSION if tally.keep_top is None else TOP_SCHEMA_VERSION,
        "store": str(Path(config.store).absolute()) if "://" not in config.store else config.store,
        "store_manifest": store.manifest.to_json(),
        "layer": layer,
        "directions": [
            {
                "name": direction.name,
                "kind": direction.kind,
                "directions": len(direction.values),
                "file": direction.origin,
                "fingerprint": direction.fingerprint,
            }
            for direction in directions
        ],
        "behaviors": [direction.name for direction in directions],
        "counts": counts,
        **best,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
