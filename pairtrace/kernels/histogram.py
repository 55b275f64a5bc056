"""The distribution of a stream of cosines, for many directions at once, in memory that does not grow with the stream.

Letters: n rows of a block, K directions, B bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError
from pairtrace.kernels.score_inputs import score_block

if TYPE_CHECKING:
    import torch

# Rounding, also that of rows whose norm was taken before, carries a cosine a little past 1, not this far.
LARGEST_SCORE = 1.01


class ScoreHistogram:
    """Counts the scores of every direction in bins of equal width over [-1, 1].

    A bin holds scores from its lower edge up to, not including, its upper edge; the last one includes 1. Scores that
    rounding carried past 1 or -1 count in the last or first bin. NaN is counted apart.

    The result does not depend on the block sizes or the order of the blocks.

    Attributes:
        directions: K.
        bins: B.
        edges: float64 [B + 1] from -1 to 1; exact where B is a power of two.
        counts: int64 [K, B].
        nan_count: int64 [K].
    """

    def __init__(self, directions: int = 1, bins: int = 4096) -> None:
        for name, value in (("directions", directions), ("bins", bins)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        self.directions = directions
        self.bins = bins
        self.edges = np.linspace(-1.0, 1.0, bins + 1)
        self.counts = np.zeros((directions, bins), np.int64)
        self.nan_count = np.zeros(directions, np.int64)

    def update(self, scores: np.ndarray | torch.Tensor) -> None:
        """Count a block of scores.

        Args:
            scores: float32 [n, K], or [n] for one direction; numpy array or torch tensor, not kept.

        Raises:
            ConfigError: `scores` has another dtype or shape, or holds values that are no cosines (the other values of
                the block have been counted then).
        """
        from pairtrace.kernels import histogram_numba

        far = histogram_numba.update(
            score_block(scores, self.directions), self.edges, LARGEST_SCORE, self.counts, self.nan_count
        )
        if far:
            raise ConfigError(f"a histogram of cosines takes scores between -1 and 1, but {far} are beyond")

    def merge(self, other: ScoreHistogram) -> None:
        """Add the counts of other rows of the same directions.

        Raises:
            ConfigError: the other histogram has other directions or bins.
        """
        if self.counts.shape != other.counts.shape:
            raise ConfigError(f"histograms differ in directions and bins: {self.counts.shape} and {other.counts.shape}")
        self.counts += other.counts
        self.nan_count += other.nan_count

    def quantile(self, q: float) -> np.ndarray:
        """The score that a share `q` of the scores does not exceed, per direction.

        It is known to within a bin: the value of the full sample (`numpy.quantile`, method "inverted_cdf") lies in the
        same bin, so the error is at most 2 / B (0.0005 for 4,096 bins). Within the bin the scores are taken as evenly
        spread.

        Args:
            q: between 0 and 1.

        Returns:
            float64 [K]; NaN for a direction without scores.

        Raises:
            ConfigError: `q` is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ConfigError(f"a quantile is between 0 and 1, not {q}")
        totals = self.counts.sum(axis=1)
        below = np.cumsum(self.counts, axis=1)
        quantiles = np.full(self.directions, np.nan)
        for direction in np.flatnonzero(totals).tolist():
            position = min(max(int(np.ceil(q * totals[direction])), 1), int(totals[direction]))
            place = int(np.searchsorted(below[direction], position))
            held = int(self.counts[direction, place])
            within = (position - int(below[direction, place]) + held - 0.5) / held
            quantiles[direction] = self.edges[place] + within * (self.edges[place + 1] - self.edges[place])
        return quantiles

    def count_at_least(self, score: float) -> np.ndarray:
        """How many scores are in the bin of `score` or above, per direction.

        Exact where `score` is an edge; elsewhere it includes the scores of the same bin that are lower.

        Args:
            score: between -1 and 1.

        Returns:
            int64 [K].

        Raises:
            ConfigError: `score` is not between -1 and 1.
        """
        if not -1 <= score <= 1:
            raise ConfigError(f"a cosine is between -1 and 1, not {score}")
        place = min(int(np.searchsorted(self.edges, score, side="right")) - 1, self.bins - 1)
        counted: np.ndarray = self.counts[:, place:].sum(axis=1)
        return counted
