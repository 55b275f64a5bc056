"""The scoring stage: cosine of every pair of a store with every behaviour.

Legend: N pairs, D width, K directions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.directions import Direction, load_directions
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.scores_table import SCHEMA_VERSION, write_scores
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, DirectionError, LayerError
from pairtrace.kernels.cosine import cosine_max, cosine_scores
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

_MISSING, _OK, _QUARANTINED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `score` does.

    Attributes:
        store: path of the activation store.
        directions: direction files (or plain .npy and .safetensors), at least one.
        out: parquet file to write.
        layer: residual layer; None takes the deepest one that the store and every behaviour have.
        allow_incomplete: score the finished rows of a store that still misses some.
    """

    store: str
    directions: tuple[str, ...]
    out: str
    layer: int | None = None
    allow_incomplete: bool = False

    def __post_init__(self) -> None:
        if not self.directions:
            raise ConfigError("no direction file was given; expected at least one")
        if not self.out.endswith(".parquet"):
            raise ConfigError(f"--out is {self.out!r}; scores files are parquet and end in .parquet")


@dataclass(frozen=True, kw_only=True)
class BehaviorScores:
    """Scores of one behaviour.

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
        ConfigError: the scores file cannot be written.
    """
    begun = time.perf_counter()
    store = ActivationStore.open(config.store, allow_incomplete=config.allow_incomplete)
    layer, directions = select_directions(store, config.directions, config.layer)
    scores = score_rows(store, layer, directions, progress)
    status = store.status()
    usable = status == _OK
    counts = {
        "rows": store.rows,
        "scored": int(np.isfinite(next(iter(scores.values()))).sum()),
        "quarantined": int((status == _QUARANTINED).sum()),
        "undefined": int((usable & np.isnan(next(iter(scores.values())))).sum()),
        "missing": int((status == _MISSING).sum()),
    }
    manifest = _manifest(config, store, layer, directions, counts)
    write_scores(config.out, store.pair_ids(), store.sources(), scores, usable, manifest)
    seconds = time.perf_counter() - begun
    return ScoreSummary(
        out=config.out,
        layer=layer,
        **counts,
        behaviors=tuple(_describe(direction, scores[direction.name], usable) for direction in directions),
        seconds=seconds,
        rows_per_second=store.rows / seconds,
    )


def select_directions(store: ActivationStore, paths: Sequence[str], layer: int | None) -> tuple[int, list[Direction]]:
    """Load the direction files for one layer of the store.

    Returns:
        The layer, and the behaviours at that layer with unique names.

    Raises:
        DirectionError, LayerError: see `score`.
    """
    if layer is not None and layer not in store.layers:
        raise LayerError(f"layer {layer} is not in {store.path}, which holds layers {list(store.layers)}")
    chosen = _deepest_common_layer(store, paths) if layer is None else layer
    found: dict[str, Direction] = {}
    for path in paths:
        loaded = load_directions(
            path,
            layer=chosen,
            width=store.width,
            model_fingerprint=store.manifest.model_fingerprint,
            tokenizer_fingerprint=store.manifest.tokenizer_fingerprint,
        )
        for direction in loaded:
            if direction.name in found:
                raise DirectionError(
                    f"the behaviour {direction.name!r} is in {found[direction.name].origin} and in {path}; "
                    "names must be unique: rename one with --name when building it, or rename the file"
                )
            expected = store.manifest.template_fingerprint
            if direction.template_fingerprint not in (None, expected):
                logger.warning(
                    "%s: %r was made with another chat template (%s) than the store (%s)",
                    path, direction.name, direction.template_fingerprint, expected,
                )  # fmt: skip
            found[direction.name] = replace(direction, layer=chosen)
    return chosen, list(found.values())


def _deepest_common_layer(store: ActivationStore, paths: Sequence[str]) -> int:
    common = set(store.layers)
    told = False
    listed = []
    for path in paths:
        by_name: dict[str, set[int]] = {}
        for direction in load_directions(path):
            if direction.layer is not None:
                by_name.setdefault(direction.name, set()).add(direction.layer)
        for name, layers in by_name.items():
            common &= layers
            told = True
            listed.append(f"{name} in {path}: {sorted(layers)}")
    if not common:
        raise LayerError(
            f"no layer is common to the store ({list(store.layers)}) and all behaviours ({'; '.join(listed)}); "
            "build the behaviours again with one of the store's layers"
        )
    if not told and len(common) > 1:
        raise LayerError(
            f"{', '.join(paths)} do not say which layer they belong to, and the store holds layers "
            f"{list(store.layers)}; choose one with --layer"
        )
    return max(common)


def score_rows(
    store: ActivationStore,
    layer: int,
    directions: Sequence[Direction],
    progress: Progress = NULL_PROGRESS,
) -> dict[str, np.ndarray]:
    """Scores per behaviour, float32 [N]: cosine, or its maximum over a bank; NaN where there is none.

    Args:
        store: finished shards are read once, in order.
        layer: a layer of the store.
        directions: at that layer, with unique names.
        progress: counts rows.
    """
    vectors = [direction for direction in directions if direction.kind == "vector"]
    banks = [direction for direction in directions if direction.kind == "bank"]
    stacked = np.concatenate([direction.values for direction in vectors]) if vectors else None
    row_dtype: Any = "bfloat16" if store.manifest.dtype == "bfloat16" else None
    scores = {direction.name: np.full(store.rows, np.nan, np.float32) for direction in directions}
    progress.start("score", store.rows, "pairs")
    for start, rows in store.blocks(layer):
        stop = start + len(rows)
        if stacked is not None:
            block = cosine_scores(rows, stacked, row_dtype=row_dtype)
            for column, direction in enumerate(vectors):
                scores[direction.name][start:stop] = block[:, column]
        for direction in banks:
            scores[direction.name][start:stop] = cosine_max(rows, direction.values, row_dtype=row_dtype)
        progress.advance(len(rows))
    progress.finish()
    unusable = store.status() != _OK
    for values in scores.values():
        values[unusable] = np.nan
    return scores


def _describe(direction: Direction, scores: np.ndarray, usable: np.ndarray) -> BehaviorScores:
    defined = scores[~np.isnan(scores)].astype(np.float64)
    return BehaviorScores(
        name=direction.name,
        kind=direction.kind,
        directions=len(direction.values),
        mean=float(defined.mean()) if defined.size else None,
        lowest=float(defined.min()) if defined.size else None,
        highest=float(defined.max()) if defined.size else None,
        undefined=int((usable & np.isnan(scores)).sum()),
        top_row=int(np.nanargmax(scores)) if defined.size else None,
    )


def _manifest(
    config: ScoreConfig,
    store: ActivationStore,
    layer: int,
    directions: Sequence[Direction],
    counts: dict[str, int],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
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
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
