"""How well probabilities tell two classes apart, and how far they can be taken at their word.

Examples of one prompt are not independent: intervals count prompts. Legend: n examples, P prompts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from pairtrace.engine.intervals import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Area:
    """The area under the ROC curve: probability that an example of class 1 outranks one of class 0, ties half.

    Attributes:
        value: the area; None where a class is missing.
        low, high: interval; 0 and 1 when nothing is known.
        method: "obuchowski": by the variance for clustered data of N. A. Obuchowski, "Nonparametric analysis of
            clustered ROC curve data", Biometrics 53, 1997, on the scale of the logit; "wilson-prompts" where that
            variance is 0 (all pairs in order): each prompt of the rarer class counts as one trial.
    """

    value: float | None
    low: float
    high: float
    method: Literal["obuchowski", "wilson-prompts"]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Examples whose probability lies between two bounds.

    Attributes:
        low, high: the bounds, the upper one exclusive but for 1.
        examples: how many.
        probability: mean probability; None without examples.
        share: share of class 1; None without examples.
        share_low, share_high: Wilson interval of it.
    """

    low: float
    high: float
    examples: int
    probability: float | None
    share: float | None
    share_low: float
    share_high: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good a probe is on some examples.

    Attributes:
        examples, positives, prompts: what it was measured on; positives are those of class 1.
        roc_auc: see `Area`.
        brier: mean squared difference of probability and class (0 is best, 0.25 is a coin); None without examples.
        calibration_error: expected calibration error: mean distance of probability and share, over the bins, weighted
            by their examples; None without examples.
        reliability: the bins, of equal width.
    """

    examples: int
    positives: int
    prompts: int
    roc_auc: Area
    brier: float | None
    calibration_error: float | None
    reliability: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def figures_of(
    probabilities: np.ndarray, labels: np.ndarray, prompts: np.ndarray, *, confidence: float = 0.95, bins: int = 10
) -> Figures:
    """Figures of the probabilities of class 1.

    Args:
        probabilities: float64 [n], between 0 and 1.
        labels: [n], 0 or 1.
        prompts: int64 [n], number of the prompt of each example.
        confidence: level of the intervals.
        bins: of the reliability diagram.
    """
    assert len(probabilities) == len(labels) == len(prompts)
    reliability = _reliability(probabilities, labels, bins, confidence)
    count = len(labels)
    gaps = [
        abs(one.probability - one.share) * one.examples
        for one in reliability
        if one.probability is not None and one.share is not None
    ]
    return Figures(
        examples=count,
        positives=int((labels == 1).sum()),
        prompts=len(np.unique(prompts)),
        roc_auc=area_of(probabilities, labels, prompts, confidence),
        brier=float(np.square(probabilities - labels).mean()) if count else None,
        calibration_error=math.fsum(gaps) / count if count else None,
        reliability=reliability,
    )


def area_of(scores: np.ndarray, labels: np.ndarray, prompts: np.ndarray, confidence: float = 0.95) -> Area:
    """The area under the ROC curve with its interval; arguments as for `figures_of`, scores of any range."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative):
        return Area(value=None, low=0.0, high=1.0, method="wilson-prompts")
    # Of each example the share of the other class that it is in order with.
    above, below = _share_below(negative, positive), 1.0 - _share_below(positive, negative)
    value = float(above.mean())
    _, cluster = np.unique(prompts, return_inverse=True)
    count = int(cluster.max()) + 1
    ones, zeros = cluster[labels == 1], cluster[labels == 0]
    # By prompt, per example of the class: how far it lies above or below the area.
    first = np.bincount(ones, above - value, minlength=count) / len(ones)
    second = np.bincount(zeros, below - value, minlength=count) / len(zeros)
    with_one, with_zero = len(np.unique(ones)), len(np.unique(zeros))
    rarer = min(with_one, with_zero)
    variance = 0.0
    if rarer > 1:
        variance = (
            with_one / (with_one - 1) * float(first @ first)
            + with_zero / (with_zero - 1) * float(second @ second)
            + 2 * count / (count - 1) * float(first @ second)
        )
    spread = value * (1 - value)
    if variance <= 0 or spread <= 0:
        low, high = wilson_interval(round(value * rarer), rarer, confidence)
        return Area(value=value, low=min(low, value), high=max(high, value), method="wilson-prompts")
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance) / spread
    middle = math.log(value / (1 - value))
    low, high = (1 / (1 + math.exp(-(middle + sign * reach))) for sign in (-1, 1))
    return Area(value=value, low=low, high=high, method="obuchowski")


def _share_below(others: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of each score the share of the others that lie below it, ties half: float64."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    result: np.ndarray = (left + right) / (2 * len(ordered))
    return result


def _reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int, confidence: float) -> tuple[Bin, ...]:
    place = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    ones = np.bincount(place, labels == 1, minlength=bins)
    sums = np.bincount(place, probabilities, minlength=bins)
    found = []
    for number in range(bins):
        count = int(counts[number])
        low, high = wilson_interval(int(ones[number]), count, confidence)
        found.append(
            Bin(
                low=number / bins,
                high=(number + 1) / bins,
                examples=count,
                probability=float(sums[number]) / count if count else None,
                share=float(ones[number]) / count if count else None,
                share_low=low,
                share_high=high,
            )
        )
    return tuple(found)
