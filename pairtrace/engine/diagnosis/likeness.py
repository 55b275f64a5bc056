"""How many pairs look like the behaviour itself: the positive control of a diagnosis.

A random direction says what a score is by chance. What a score is for a pair that does teach the behaviour is said by
the behaviour's own prompts: each one's change vector, scored against the others as if it were a pair of the data.
Legend: S scenarios (prompts), D width, n ranked pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Pairs of the data were not written by the model: the planted pairs of three organisms reach 0.87 to 0.91 of what the
# behaviour's own prompts do (medians).
REACH = 0.88
# Short of that: where look-alikes are counted as well.
NEAR_REACH = 0.7
# Quantiles of the own scores at which pairs are counted.
QUANTILES = (0.1, 0.25, 0.5)
_SAMPLES = 400


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Pairs that score as the behaviour's own prompts do.

    Attributes:
        own_scores: 10 %, 25 % and 50 % quantile of the scores of the behaviour's own prompts.
        pairs: estimated number of pairs that score like them.
        interval: 95 % bootstrap interval of it, over prompts and pairs.
        share: of the ranked pairs.
        nearly: the same estimate for scores that reach 0.7 instead of 0.88 of the own ones: look-alikes too.
        hold: pairs / nearly; near 1 where the tail has a body of its own up there, near 0 where it merely runs out, as
            that of look-alikes does. 0 where there are none.
        opposed: the same estimate at the other end: pairs that teach the opposite.
    """

    own_scores: tuple[float, float, float]
    pairs: float
    interval: tuple[float, float]
    share: float
    nearly: float
    hold: float
    opposed: float


def own_scores(bank: np.ndarray, kind: str) -> np.ndarray:
    """Score of every prompt's vector with the behaviour made from the other prompts, float64 [S].

    Args:
        bank: float32 [S, D], one vector per prompt.
        kind: "vector": cosine with the mean of the other vectors; "bank": the largest cosine with one of them.
    """
    vectors = bank.astype(np.float64)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    if kind == "bank":
        cosines = units @ units.T
        np.fill_diagonal(cosines, -np.inf)
        largest: np.ndarray = cosines.max(axis=1)
        return largest
    others = vectors.sum(axis=0) - vectors
    scores: np.ndarray = (units * others).sum(axis=1) / np.linalg.norm(others, axis=1)
    return scores


def likeness(scores: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> Likeness:
    """Estimate how many scores come from the distribution of the own scores.

    The own scores are taken times `REACH`. If m of n pairs score like that, then at least m (1 - q) of them lie at or
    above the quantile q, whatever the others do; the smallest of count / (1 - q) is the estimate (mixture proportion
    estimation over upper tails: Blanchard, Lee and Scott, "Semi-supervised novelty detection", JMLR 11, 2010).

    Args:
        scores: float32 [n].
        own: float64 [S].
        rng: of the bootstrap.
    """
    ordered = np.sort(scores)
    quantiles = np.quantile(own, QUANTILES)
    pairs, nearly = (_smallest(_at_least(ordered, reach * quantiles)) for reach in (REACH, NEAR_REACH))
    # At the quantile that decided: the smallest of resampled estimates would lie below the estimate itself.
    place = int(_estimates(_at_least(ordered, REACH * quantiles)).argmin())
    estimates = []
    for _ in range(_SAMPLES):
        counts = _at_least(ordered, REACH * np.quantile(rng.choice(own, len(own)), QUANTILES))
        estimates.append(_estimates(rng.binomial(len(scores), counts / len(scores)))[place])
    low, high = np.quantile(estimates, (0.025, 0.975)).tolist()
    return Likeness(
        own_scores=tuple(quantiles.tolist()),
        pairs=pairs,
        interval=(low, high),
        share=pairs / len(scores),
        nearly=nearly,
        hold=pairs / nearly if nearly else 0.0,
        opposed=_smallest(_at_least(-ordered[::-1], REACH * quantiles)),
    )


def _at_least(ordered: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many of the ascending values are at or above each threshold."""
    counts: np.ndarray = len(ordered) - np.searchsorted(ordered, thresholds, side="left")
    return counts


def _estimates(counts: np.ndarray) -> np.ndarray:
    estimates: np.ndarray = counts / (1 - np.array(QUANTILES))
    return estimates


def _smallest(counts: np.ndarray) -> float:
    return float(_estimates(counts).min())
