"""What else than the behaviour may have put pairs at the top: the length of the responses, and the source.

Legend: n ranked pairs, k of them in the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atanh, sqrt, tanh

import numpy as np

from pairtrace.engine.fidelity import spearman
from pairtrace.engine.intervals import wilson_interval

_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class LengthConfounding:
    """How far the length of the responses explains the ranking.

    Attributes:
        unit: of the lengths: "tokens" or "characters".
        spearman: of score and length difference (chosen minus rejected); None where one of them does not vary.
        interval: 95 % interval of it (Fisher's z with the standard error of Bonett and Wright, "Sample size
            requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika 65, 2000).
        top_explained: share of the top that a ranking by length alone would also take, beyond chance: (overlap - k/n) /
            (1 - k/n), in the direction of the correlation; 0 is chance, 1 the same top.
        top_difference: median length difference in the top.
        other_difference: median length difference of the other pairs.
    """

    unit: str
    spearman: float | None
    interval: tuple[float, float] | None
    top_explained: float
    top_difference: float
    other_difference: float


@dataclass(frozen=True, kw_only=True)
class SourceConfounding:
    """How far the source explains the ranking.

    Attributes:
        sources: number of distinct ones.
        variance_between: share of the variance of the scores that lies between sources (eta squared); None where the
            scores do not vary.
        largest: the source with most pairs in the top.
        largest_share: its share of the top.
        largest_share_interval: 95 % Wilson interval of it.
        largest_share_of_data: its share of the ranked pairs.
    """

    sources: int
    variance_between: float | None
    largest: str
    largest_share: float
    largest_share_interval: tuple[float, float]
    largest_share_of_data: float


def top_pairs(scores: np.ndarray, k: int) -> np.ndarray:
    """bool [n]: the k highest scores, ties by position."""
    top = np.zeros(len(scores), bool)
    top[np.argsort(-scores, kind="stable")[:k]] = True
    return top


def length_confounding(scores: np.ndarray, differences: np.ndarray, k: int, unit: str) -> LengthConfounding:
    """Compare scores float [n] with length differences [n]; k < n."""
    top = top_pairs(scores, k)
    rho = spearman(scores, differences)
    return LengthConfounding(
        unit=unit,
        spearman=rho,
        interval=None if rho is None else _interval(rho, len(scores)),
        top_explained=_beyond_chance(top, differences if (rho or 0) >= 0 else -differences, k),
        top_difference=float(np.median(differences[top])),
        other_difference=float(np.median(differences[~top])),
    )


def _interval(rho: float, count: int) -> tuple[float, float]:
    if abs(rho) >= 1 or count < 4:
        return (rho, rho) if count >= 4 else (-1.0, 1.0)
    spread = _Z * sqrt((1 + rho * rho / 2) / (count - 3))
    return tanh(atanh(rho) - spread), tanh(atanh(rho) + spread)


def _beyond_chance(top: np.ndarray, values: np.ndarray, k: int) -> float:
    """Share of the top among the k largest values, beyond chance; values equal to the last one are taken in part."""
    last = np.partition(values, len(values) - k)[len(values) - k]
    above, at = values > last, values == last
    taken = (k - np.count_nonzero(above)) / np.count_nonzero(at)
    overlap = (np.count_nonzero(top & above) + taken * np.count_nonzero(top & at)) / k
    chance = k / len(values)
    return float((overlap - chance) / (1 - chance))


def source_confounding(scores: np.ndarray, sources: np.ndarray, k: int) -> SourceConfounding:
    """Compare scores float [n] with the names of the sources, object [n]."""
    names, place = np.unique(sources.astype(str), return_inverse=True)
    counts = np.bincount(place)
    values = scores.astype(np.float64)
    means = np.bincount(place, values) / counts
    total = float(np.square(values - values.mean()).sum())
    between = float((counts * np.square(means - values.mean())).sum())
    in_top = np.bincount(place[top_pairs(scores, k)], minlength=len(names))
    largest = int(in_top.argmax())
    return SourceConfounding(
        sources=len(names),
        variance_between=between / total if total else None,
        largest=str(names[largest]),
        largest_share=float(in_top[largest] / k),
        largest_share_interval=wilson_interval(int(in_top[largest]), k),
        largest_share_of_data=float(counts[largest] / len(scores)),
    )
