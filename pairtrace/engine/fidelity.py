"""How well the scores of one store agree with those of another that holds the same pairs in another dtype.

Letters: N pairs, n rows of a block, D width, B behaviours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.directions import Direction, load_directions
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.score_blocks import Scorer, rounding_norms
from pairtrace.engine.score_directions import select_directions
from pairtrace.kernels.topk import StreamingTopK
from pairtrace.store.layout import OK, to_float32
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

# Below these a ranking is no longer the same for practical purposes.
LOWEST_SPEARMAN = 0.999
LOWEST_OVERLAP = 0.98
# The part of the ranking whose rows are compared.
TOP_SHARE = 0.01

RANDOM_DIRECTIONS = 8
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class DirectionFidelity:
    """Agreement of two stores on one behaviour at one layer.

    Attributes:
        behavior: its name.
        layer: residual layer.
        rows: pairs with a score in both stores.
        spearman: rank correlation of the scores, ties sharing their mean rank; None where all scores are equal.
        top_rows: size of the top that is compared, 1 % of the rows.
        top_overlap: share of it that both stores agree on; None without rows.
        largest_difference: of the scores, over all rows; None without rows.
        worst_row: the row with that difference.
        worst_pair_id: its pair_id, hex.
        score_before: its score in the first store.
        score_after: its score in the second.
        without_score: rows that have a score in only one of the stores.
    """

    behavior: str
    layer: int
    rows: int
    spearman: float | None
    top_rows: int
    top_overlap: float | None
    largest_difference: float | None
    worst_row: int | None
    worst_pair_id: str | None
    score_before: float | None
    score_after: float | None
    without_score: int

    @property
    def sufficient(self) -> bool:
        """Whether rankings by the two stores are practically the same.

        One row at the edge of the top may always change places, however small the top is.
        """
        if self.without_score or (self.spearman is not None and self.spearman < LOWEST_SPEARMAN):
            return False
        if self.top_overlap is None or self.top_overlap >= LOWEST_OVERLAP:
            return True
        return round((1 - self.top_overlap) * self.top_rows) <= 1


def fidelity_directions(
    store: ActivationStore, paths: Sequence[str], layer: int | None, progress: Progress = NULL_PROGRESS
) -> dict[int, list[Direction]]:
    """The behaviours to compare, by layer.

    Args:
        store: the store whose rows they must fit.
        paths: direction files; without any, random directions (of a fixed seed) and the mean row of the store.
        layer: only this layer; None for every layer of the store that all behaviours have.
        progress: receives one stage where the mean row is taken.

    Raises:
        DirectionError: a direction has another width, model or tokenizer than the store, or unusable values.
        LayerError: no layer is common to the store and the behaviours.
    """
    if paths:
        deepest, _ = select_directions(store, paths, layer)
        layers = [deepest] if layer is not None else _common_layers(store, paths, deepest)
        return {one: select_directions(store, paths, one, note=False)[1] for one in layers}
    if layer is not None:
        store.norms(layer)  # raises where the store lacks it
    return {one: _own_directions(store, one, progress) for one in (store.layers if layer is None else (layer,))}


def compare(
    before: ActivationStore,
    after: ActivationStore,
    directions: dict[int, list[Direction]],
    progress: Progress = NULL_PROGRESS,
) -> list[DirectionFidelity]:
    """Score both stores shard by shard; one score per pair, behaviour and store of a layer is held at a time.

    Args:
        before: the store that counts as right.
        after: a store of the same pairs in shards of the same size.
        directions: the behaviours by layer.
        progress: receives one stage, counted in shards.
    """
    usable = before.status() == OK
    identifiers = before.pair_ids()
    progress.start("compare", len(directions) * len(before.finished_shards()), "shards")
    found: list[DirectionFidelity] = []
    for layer, chosen in directions.items():
        scores = np.full((2, before.rows, len(chosen)), np.nan, np.float32)
        scorers = [Scorer.of(chosen, store.manifest.dtype) for store in (before, after)]
        norms = [rounding_norms(store, layer) for store in (before, after)]
        for (start, rows), (other, rounded) in zip(before.blocks(layer), after.blocks(layer), strict=True):
            assert start == other and len(rows) == len(rounded)
            span = slice(start, start + len(rows))
            for side, block in enumerate((rows, rounded)):
                given = norms[side]
                scores[side, span] = scorers[side].scores(block, None if given is None else given[span])
            progress.advance(1)
        scores[:, ~usable] = np.nan
        found += [
            _agreement(direction.name, layer, scores[0, :, column], scores[1, :, column], identifiers)
            for column, direction in enumerate(chosen)
        ]
    progress.finish()
    return found


def _agreement(
    behavior: str, layer: int, before: np.ndarray, after: np.ndarray, identifiers: np.ndarray
) -> DirectionFidelity:
    scored = ~np.isnan(before) & ~np.isnan(after)
    rows = np.flatnonzero(scored)
    top_rows = max(1, round(TOP_SHARE * len(rows)))
    worst = int(rows[np.abs(before[rows] - after[rows]).argmax()]) if rows.size else None
    tops = [_best_rows(np.where(scored, scores, np.nan), top_rows) for scores in (before, after)]
    return DirectionFidelity(
        behavior=behavior,
        layer=layer,
        rows=len(rows),
        spearman=spearman(before[rows], after[rows]),
        top_rows=min(top_rows, len(rows)),
        top_overlap=len(np.intersect1d(tops[0], tops[1])) / len(tops[0]) if rows.size else None,
        largest_difference=None if worst is None else float(abs(before[worst] - after[worst])),
        worst_row=worst,
        worst_pair_id=None if worst is None else identifiers[worst].tobytes().hex(),
        score_before=None if worst is None else float(before[worst]),
        score_after=None if worst is None else float(after[worst]),
        without_score=int(np.count_nonzero(np.isnan(before) != np.isnan(after))),
    )


def _best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    best = StreamingTopK(k)
    best.update(scores, 0)
    _, rows = best.result()
    chosen: np.ndarray = rows[0]
    return chosen


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Rank correlation of two samples without NaN, float [n]; None where one of them does not vary."""
    ranks = [_mean_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks] if len(first) else ranks
    scale = float(np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float(centred[0] @ centred[1]) / scale if scale else None


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, float64 [n]; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: np.ndarray = np.cumsum(counts) - (counts + 1) / 2
    ranks: np.ndarray = np.take(shared, group)
    return ranks


def _common_layers(store: ActivationStore, paths: Sequence[str], deepest: int) -> list[int]:
    layers_of: dict[str, set[int]] = {}
    for path in paths:
        for direction in load_directions(path, note=False):
            if direction.layer is not None:
                layers_of.setdefault(direction.name, set()).add(direction.layer)
    # Files that say nothing of layers belong to the only layer of the store.
    return sorted(set(store.layers).intersection(*layers_of.values())) if layers_of else [deepest]


def _own_directions(store: ActivationStore, layer: int, progress: Progress) -> list[Direction]:
    total = np.zeros(store.width)
    progress.start(f"mean of layer {layer}", len(store.finished_shards()), "shards")
    for _, rows in store.blocks(layer):
        total += to_float32(rows).sum(axis=0, dtype=np.float64)  # quarantined rows are zeros
        progress.advance(1)
    progress.finish()
    random = np.random.default_rng([_SEED, layer]).standard_normal((RANDOM_DIRECTIONS, store.width))
    named = {f"random-{number}": values for number, values in enumerate(random)}
    if total.any():
        named["mean"] = total / np.abs(total).max()
    return [
        Direction(
            name=name, layer=layer, values=values.astype(np.float32)[None], kind="vector", origin="made to compare"
        )
        for name, values in named.items()
    ]
