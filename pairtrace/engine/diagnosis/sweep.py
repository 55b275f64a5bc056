"""Scores of many directions in one pass over a store.

Legend: N pairs, m pairs looked at, D width, B behaviours of K directions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.progress import Progress
from pairtrace.engine.score_blocks import rounding_norms
from pairtrace.kernels.cosine import RowDtype, cosine_blocks, prepare_directions
from pairtrace.kernels.histogram import ScoreHistogram
from pairtrace.store.layout import to_float32
from pairtrace.store.reader import ActivationStore

# More pairs tell nothing new about agreement or a null, but take memory: every so-many-th pair stands for the others.
MOST_PAIRS = 200_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Behaviours whose scores are wanted.

    Attributes:
        directions: float32 [U, D], which the behaviours share.
        members: per behaviour int64 [K], its directions among them; its score is the largest.
        counted: only the distribution of their scores is kept.
    """

    directions: np.ndarray
    members: tuple[np.ndarray, ...]
    counted: bool = False

    @classmethod
    def of_vectors(cls, directions: np.ndarray, *, counted: bool = False) -> Group:
        """Every direction is a behaviour of its own."""
        members = tuple(np.arange(len(directions))[:, None])
        return cls(directions=directions, members=members, counted=counted)

    @classmethod
    def of_banks(cls, banks: np.ndarray, *, counted: bool = False) -> Group:
        """Banks float32 [B, K, D]."""
        behaviors, size, width = banks.shape
        members = tuple(np.arange(behaviors * size).reshape(behaviors, size))
        return cls(directions=banks.reshape(-1, width), members=members, counted=counted)

    def reduce(self, block: np.ndarray) -> np.ndarray:
        """Scores of the behaviours, float32 [n, B], from those of the directions [n, U]."""
        if all(len(one) == 1 for one in self.members):
            plain: np.ndarray = block[:, np.concatenate(self.members)]
            return plain
        return np.stack([block[:, one].max(axis=1) for one in self.members], axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """What a pass found.

    Attributes:
        scores: per group float32 [m, B] (no rows where only the distribution was wanted).
        histograms: per group the distribution of every behaviour's scores, or None.
    """

    scores: tuple[np.ndarray, ...]
    histograms: tuple[ScoreHistogram | None, ...]


def thinned(rows: np.ndarray, most: int = MOST_PAIRS) -> np.ndarray:
    """Positions of every so-many-th of the ranked pairs, int64 [m], at most `most`; all of them where there are few."""
    step = -(-len(rows) // most)
    return np.arange(0, len(rows), max(1, step))


def sweep(store: ActivationStore, layer: int, rows: np.ndarray, groups: Sequence[Group], progress: Progress) -> Swept:
    """Score some rows with every behaviour of every group.

    Args:
        store: the activation store.
        layer: of the store.
        rows: int64 [m], row numbers, ascending, all of them computed.
        groups: at least one, of the store's width.
        progress: receives one stage, counted in pairs.

    Raises:
        StoreError: the store is damaged.
    """
    units = prepare_directions(np.concatenate([group.directions for group in groups]))
    edges = np.cumsum([0] + [len(group.directions) for group in groups])
    kept = [np.full((0 if group.counted else len(rows), len(group.members)), np.nan, np.float32) for group in groups]
    counts = [ScoreHistogram(len(group.members)) if group.counted else None for group in groups]
    row_dtype: RowDtype | None = "bfloat16" if store.manifest.dtype == "bfloat16" else None
    norms = rounding_norms(store, layer)
    progress.start(f"layer {layer}", len(rows), "pairs")
    for start, block in store.blocks(layer):
        first, last = np.searchsorted(rows, (start, start + len(block))).tolist()
        if first == last:
            continue
        inside = rows[first:last] - start
        whole = last - first == len(block)
        values = block if whole else to_float32(block)[inside]
        lengths = None if norms is None else norms[rows[first:last]]
        done = first
        for _, scores in cosine_blocks(values, units, norms=lengths, row_dtype=row_dtype if whole else None):
            for position, group in enumerate(groups):
                found = group.reduce(scores[:, edges[position] : edges[position + 1]])
                histogram = counts[position]
                if histogram is None:
                    kept[position][done : done + len(found)] = found
                else:
                    histogram.update(np.ascontiguousarray(found))
            done += len(scores)
        progress.advance(last - first)
    progress.finish()
    return Swept(scores=tuple(kept), histograms=tuple(counts))
