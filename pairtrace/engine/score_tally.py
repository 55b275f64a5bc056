"""What is kept of scores while they stream by: all of them, or only the best of each behaviour.

Legend: N pairs, n rows of a block, B behaviours, k scores kept per behaviour, M rows of the scores file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pairtrace.engine.scores_writer import DenseRanking, Ranking, SparseRanking
from pairtrace.kernels.histogram import ScoreHistogram
from pairtrace.kernels.topk import StreamingTopK

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
# Counts in all histograms together; many behaviours get coarser ones.
_HISTOGRAM_COUNTS = 1 << 22
_FEWEST_BINS, _MOST_BINS = 256, 4096


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the scores of one behaviour.

    Attributes:
        scored: number of rows with a score.
        undefined: rows with activations but without a cosine.
        mean, lowest, highest: over the rows with a score; None if there are none.
        top_row: first row of the highest score, or None.
    """

    scored: int
    undefined: int
    mean: float | None
    lowest: float | None
    highest: float | None
    top_row: int | None


class _RunningStatistics:
    def __init__(self, behaviors: int) -> None:
        self._scored = np.zeros(behaviors, np.int64)
        self._undefined = np.zeros(behaviors, np.int64)
        self._total = np.zeros(behaviors, np.float64)
        self._lowest = np.full(behaviors, np.inf, np.float32)
        self._highest = np.full(behaviors, -np.inf, np.float32)
        self._top_row = np.full(behaviors, -1, np.int64)

    def add(self, start: int, block: np.ndarray, usable: int) -> None:
        absent = np.isnan(block)
        scored = len(block) - np.count_nonzero(absent, axis=0)
        complete = int(scored.min()) == len(block)
        self._scored += scored
        self._undefined += usable - scored
        self._total += (block if complete else np.where(absent, 0, block)).sum(axis=0, dtype=np.float64)
        self._lowest = np.fmin(self._lowest, np.fmin.reduce(block, axis=0))
        highest = np.fmax.reduce(block, axis=0)
        # Seldom, once some blocks have been seen; NaN is not above anything.
        better = np.flatnonzero(highest > self._highest)
        if better.size:
            self._highest[better] = highest[better]
            self._top_row[better] = start + np.nanargmax(block[:, better], axis=0)

    def result(self, behavior: int) -> Statistics:
        scored = int(self._scored[behavior])
        return Statistics(
            scored=scored,
            undefined=int(self._undefined[behavior]),
            mean=float(self._total[behavior] / scored) if scored else None,
            lowest=float(self._lowest[behavior]) if scored else None,
            highest=float(self._highest[behavior]) if scored else None,
            top_row=int(self._top_row[behavior]) if scored else None,
        )


class AllScores:
    """Keeps every score: float32 [B, N]."""

    keep_top: int | None = None

    def __init__(self, behaviors: int, usable: np.ndarray) -> None:
        self._usable = usable
        self._values = np.full((behaviors, len(usable)), np.nan, np.float32)
        self._statistics = _RunningStatistics(behaviors)

    def add(self, start: int, block: np.ndarray) -> None:
        """Take the scores float32 [n, B] of the rows from `start` on; NaN where the pair has no activations."""
        stop = start + len(block)
        self._values[:, start:stop] = block.T
        self._statistics.add(start, block, int(np.count_nonzero(self._usable[start:stop])))

    def statistics(self, behavior: int) -> Statistics:
        """Of one behaviour, by its column."""
        return self._statistics.result(behavior)

    def rows(self) -> np.ndarray:
        """int64 [M]: all rows."""
        return np.arange(len(self._usable))

    def ranking(self, behavior: int) -> Ranking:
        """Scores and ranks of one behaviour for the rows of the file."""
        return DenseRanking.of(self._values[behavior], self._usable)

    def summary(self, behavior: int) -> dict[str, Any]:
        """What the scores file says beyond its rows: nothing."""
        return {}


class TopScores:
    """Keeps the k best scores of every behaviour, and a histogram of the others."""

    def __init__(self, behaviors: int, usable: np.ndarray, keep_top: int) -> None:
        self.keep_top: int | None = keep_top
        bins = 1 << max(0, (_HISTOGRAM_COUNTS // behaviors).bit_length() - 1)
        self._usable = usable
        self._best = StreamingTopK(keep_top, behaviors)
        self._histogram = ScoreHistogram(behaviors, min(max(bins, _FEWEST_BINS), _MOST_BINS))
        self._statistics = _RunningStatistics(behaviors)
        self._result: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._quantiles: np.ndarray | None = None

    def add(self, start: int, block: np.ndarray) -> None:
        """Take the scores float32 [n, B] of the rows from `start` on; NaN where the pair has no activations."""
        self._best.update(block, start)
        self._histogram.update(block)
        self._statistics.add(start, block, int(np.count_nonzero(self._usable[start : start + len(block)])))

    def statistics(self, behavior: int) -> Statistics:
        """Of one behaviour, by its column."""
        return self._statistics.result(behavior)

    def rows(self) -> np.ndarray:
        """int64 [M]: the rows that are among the best of any behaviour, ascending."""
        return self._finished()[2]

    def ranking(self, behavior: int) -> Ranking:
        """Scores and ranks of one behaviour for the rows of the file."""
        scores, rows, union = self._finished()
        held = rows[behavior] >= 0
        return SparseRanking.of(
            np.searchsorted(union, rows[behavior][held]),
            scores[behavior][held],
            ranked=self._statistics.result(behavior).scored,
        )

    def summary(self, behavior: int) -> dict[str, Any]:
        """What the scores file says of the rows that it leaves out: quantiles, each known to within a bin."""
        if self._quantiles is None:
            self._quantiles = np.stack([self._histogram.quantile(q) for q in QUANTILES])
        statistics = self._statistics.result(behavior)
        values = self._quantiles[:, behavior].tolist() if statistics.scored else [None] * len(QUANTILES)
        return {
            "scored": statistics.scored,
            "mean": statistics.mean,
            "lowest": statistics.lowest,
            "highest": statistics.highest,
            "quantiles": dict(zip(map(str, QUANTILES), values, strict=True)),
            "quantile_error": 2 / self._histogram.bins,
        }

    def _finished(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and rows [B, m], best first, and the union of the rows."""
        if self._result is None:
            scores, rows = self._best.result()
            self._result = scores, rows, np.unique(rows[rows >= 0])
        return self._result


Tally = AllScores | TopScores
