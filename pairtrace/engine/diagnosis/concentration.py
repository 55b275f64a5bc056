"""How concentrated the scores are at the top, against what chance and the ranking's other end have there.

Legend: n ranked pairs, k of them in the top, R random behaviours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from pairtrace.kernels.histogram import ScoreHistogram

# Where the tail of random directions begins, and where it is far: shares of their scores beyond.
TAIL, FAR_TAIL = 0.01, 0.001
_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Excess:
    """Pairs at or above a threshold, beyond what a null has there.

    Attributes:
        null: "sign-flip" (the ranking's other end), "data-like" (random directions with the covariance of the rows) or
            "sphere" (uniform random directions).
        tail: share of the scores of random directions that lie beyond the threshold, 0.01 or 0.001; None for the
            sign-flip null, whose threshold is the lowest score of the top k.
        threshold: score from which pairs are counted.
        pairs: ranked pairs at or above it.
        expected: by the null.
        excess: pairs - expected.
        interval: 95 % interval of the excess: for random directions from the counts of each of them, for the sign-flip
            null from the two counts as Poisson numbers.
    """

    null: str
    tail: float | None
    threshold: float
    pairs: int
    expected: float
    excess: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Mass:
    """How the positive scores are spread over pairs.

    Attributes:
        top_share: share of the sum of positive scores that the top k have.
        effective_pairs: (sum w)^2 / sum w^2 of the positive scores w (participation ratio): as many pairs with equal
            scores would be as spread.
        effective_share: of the ranked pairs.
        gini: Gini coefficient of max(score, 0) over all ranked pairs; 0 is even, 1 is all in one pair.
    """

    top_share: float
    effective_pairs: float
    effective_share: float
    gini: float


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Whether the pairs as a whole lean towards the behaviour.

    Attributes:
        median: of the scores.
        chance: standard deviation of the median over directions drawn like the data.
        deviations: median / chance.
    """

    median: float
    chance: float
    deviations: float


def mass(scores: np.ndarray, k: int) -> Mass:
    """Of scores float [n]."""
    weights = np.sort(np.maximum(scores.astype(np.float64), 0))
    total, count = float(weights.sum()), len(weights)
    if total == 0:
        return Mass(top_share=0.0, effective_pairs=0.0, effective_share=0.0, gini=0.0)
    effective = total * total / float(np.square(weights).sum())
    places = np.arange(1, count + 1)
    return Mass(
        top_share=float(weights[max(0, count - k) :].sum()) / total,
        effective_pairs=effective,
        effective_share=effective / count,
        gini=float(((2 * places - count - 1) * weights).sum() / (count * total)),
    )


def flipped_excess(scores: np.ndarray, k: int, *, centred: bool) -> Excess:
    """Pairs in the top k against those as far down.

    Args:
        scores: float [n].
        k: size of the top.
        centred: measure from the median: for methods whose zero means nothing, and for banks, whose largest cosine
            has no opposite. The cosine of a vector is measured from zero.
    """
    values = scores - np.median(scores) if centred else scores
    threshold = float(max(np.partition(values, len(values) - k)[len(values) - k], np.finfo(np.float32).tiny))
    pairs, below = int(np.count_nonzero(values >= threshold)), int(np.count_nonzero(values <= -threshold))
    spread = _Z * sqrt(max(1, pairs + below))
    return Excess(
        null="sign-flip",
        tail=None,
        threshold=threshold,
        pairs=pairs,
        expected=float(below),
        excess=float(pairs - below),
        interval=(pairs - below - spread, pairs - below + spread),
    )


def random_excess(scores: np.ndarray, null: str, tail: float, chance: ScoreHistogram) -> Excess:
    """Pairs at or above the score that a share `tail` of the scores of random directions reach.

    Args:
        scores: float [n].
        null: its name.
        tail: the share.
        chance: scores of R random behaviours, each over the same pairs.
    """
    shares = chance.counts / np.maximum(1, chance.counts.sum(axis=1, keepdims=True))
    tails = np.cumsum(shares[:, ::-1], axis=1)[:, ::-1]
    place = int(np.argmax(tails.mean(axis=0) <= tail))
    threshold = float(chance.edges[place])
    by_chance = tails[:, place] * len(scores)
    pairs, expected = int(np.count_nonzero(scores >= threshold)), float(by_chance.mean())
    low, high = np.quantile(by_chance, (0.025, 0.975)).tolist()
    return Excess(
        null=null,
        tail=tail,
        threshold=threshold,
        pairs=pairs,
        expected=expected,
        excess=pairs - expected,
        # A few extreme directions can carry the mean past the quantiles.
        interval=(pairs - max(high, expected), pairs - min(low, expected)),
    )


def shift(scores: np.ndarray, chance: ScoreHistogram) -> Shift:
    """Compare the median of scores float [n] with the medians of random directions."""
    medians = chance.quantile(0.5)
    spread = float(np.sqrt(np.nanmean(np.square(medians))))
    median = float(np.median(scores))
    return Shift(median=median, chance=spread, deviations=median / spread if spread else 0.0)
