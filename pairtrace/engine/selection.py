"""Which pairs of a ranking an edit takes: a number of them, a share, a threshold, or a false-discovery rate.

Legend: N rows, n ranked rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pairtrace.errors import ConfigError

Null = Literal["sign-flip", "random"]
RULES = ("k", "fraction", "threshold", "fdr")
# Furthest that the median of the scores may lie above 0 for the sign-flip null, in standard deviations (robust ones).
# Noise that is moved by 0.3 deviations has four times as many scores above +2 as below -2. The planted pairs of the
# organisms move the median by less than 0.2; a training's own margins lie 1 and more above 0.
LARGEST_SHIFT = 0.3
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """How many pairs are taken from the top of a ranking; exactly one of the four is given.

    Attributes:
        k: this many.
        fraction: this share of the ranked pairs, above 0 and at most 1, rounded to the nearest number.
        threshold: those with at least this score.
        fdr: as many as keep the estimated share of false discoveries at or below this, above 0 and below 1.
        null: what a score would be by chance, for `fdr`: "sign-flip" takes the scores of the opposite direction
            (the ranking read from its other end), "random" the scores of random directions.
    """

    k: int | None = None
    fraction: float | None = None
    threshold: float | None = None
    fdr: float | None = None
    null: Null = "sign-flip"

    def __post_init__(self) -> None:
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"expected exactly one of -k, --fraction, --threshold and --fdr, got {', '.join(given) or 'none'}"
            )
        if self.k is not None and self.k < 1:
            raise ConfigError(f"-k is {self.k}; expected at least 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"--fraction is {self.fraction}; expected above 0 and at most 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold is {self.threshold}; expected a number")
        if self.fdr is not None and not 0 < self.fdr < 1:
            raise ConfigError(f"--fdr is {self.fdr}; expected above 0 and below 1")
        if self.null not in ("sign-flip", "random"):
            raise ConfigError(f"--null is {self.null!r}; expected sign-flip or random")

    def describe(self) -> str:
        """The rule in words, for a change record."""
        if self.fdr is not None:
            return f"false-discovery rate at most {self.fdr:g} against the {self.null} null"
        if self.threshold is not None:
            return f"score at least {self.threshold:g}"
        return f"the top {self.k}" if self.k is not None else f"the top {self.fraction:.4%} of the ranked pairs"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a rule takes.

    Attributes:
        rows: int64, row numbers, best first.
        lowest: the lowest score among them.
        fdr: estimated share of false discoveries, where the rule asks for one.
    """

    rows: np.ndarray
    lowest: float
    fdr: float | None


def select(
    rule: SelectionRule,
    scores: np.ndarray,
    ranks: np.ndarray,
    tail: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    otherwise: str = "",
) -> Selection:
    """Take rows from the top of a ranking.

    Args:
        rule: how many.
        scores: float32 [N]; NaN without a score.
        ranks: int64 [N]; 1 is the highest score, 0 stands for no rank.
        tail: share of chance scores at or above each of some scores, float64 [n]; needed for `null="random"`.
        otherwise: what to do where a false-discovery rate takes no pair, for the message.

    Raises:
        ConfigError: the rule asks for more pairs than have a rank, or takes none.
    """
    ranked = np.flatnonzero(ranks)
    order = ranked[np.argsort(ranks[ranked], kind="stable")]
    ordered = scores[order]
    if not len(order):
        raise ConfigError("no pair has a rank; there is nothing to select")
    estimate: np.ndarray | None = None
    if rule.k is not None:
        count = rule.k
    elif rule.fraction is not None:
        count = max(1, round(rule.fraction * len(order)))
    elif rule.threshold is not None:
        count = int(np.count_nonzero(ordered >= rule.threshold))
    else:
        assert rule.fdr is not None
        estimate = false_discovery_rates(ordered, tail if rule.null == "random" else None)
        below = np.flatnonzero(estimate <= rule.fdr)
        count = int(below[-1]) + 1 if below.size else 0
    if count > len(order):
        raise ConfigError(f"-k is {count}, but only {len(order)} of {len(ranks)} pairs have a rank")
    if count == 0:
        best = f"the highest score is {ordered[0]:.4f}"
        if estimate is not None:
            best += f", the lowest reachable rate {estimate.min():.4f}" + (f"; {otherwise}" if otherwise else "")
        raise ConfigError(f"the rule ({rule.describe()}) takes no pair: {best}")
    return Selection(
        rows=order[:count],
        lowest=float(ordered[count - 1]),
        fdr=None if estimate is None else float(estimate[count - 1]),
    )


def require_symmetric(scores: np.ndarray, *, otherwise: str) -> None:
    """Refuse the sign-flip null where it means nothing: where most pairs score above zero.

    It takes an innocent pair to score as often above zero as below. The margins of trained pairs do not, nor do maxima
    over a bank. A median below zero is let pass: the estimate is then too high, never too low.

    Args:
        scores: float [n] of the ranked pairs.
        otherwise: what to do instead, for the message.

    Raises:
        ConfigError: the median lies further above 0 than `LARGEST_SHIFT` deviations, and than chance explains.
    """
    if not len(scores):
        return
    median = float(np.median(scores))
    deviation = _MAD_TO_DEVIATION * float(np.median(np.abs(scores - median)))
    # Standard error of a median of normal scores: 1.2533 deviations / sqrt(n).
    chance = 3 * 1.2533 / math.sqrt(len(scores))
    if median > max(LARGEST_SHIFT, chance) * deviation:
        above = np.count_nonzero(scores > 0) / len(scores)
        shift = f" ({median / deviation:.1f} standard deviations)" if deviation else ""
        raise ConfigError(
            f"--fdr with the sign-flip null takes the scores of innocent pairs to lie around 0, but their median is "
            f"{median:.4f}{shift} and {above:.0%} of the pairs score above 0, so that the estimate would be far too "
            f"low; {otherwise}"
        )


def false_discovery_rates(ordered: np.ndarray, tail: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    """Estimated share of false discoveries when a ranking is cut behind each of its pairs.

    Sign-flip null: under it a score is as likely as its negative, so (1 + number of scores <= -t) / number of scores
    >= t bounds the rate at threshold t (the knockoff+ estimate, Barber and Candes 2015, arXiv 1404.5609, eq. 1.9).
    Random null: N * P(chance score >= t) / number of scores >= t (Storey 2002, with all pairs null). Both are made
    monotone: a longer selection's rate, where lower, holds for the shorter one as well.

    Args:
        ordered: float32 [n] scores, highest first.
        tail: as for `select`; None for the sign-flip null.

    Returns:
        float64 [n], at most 1; non-decreasing.
    """
    count = len(ordered)
    # Ties are taken or left together: a cut inside them is counted as one behind them.
    at_least = count - np.searchsorted(ordered[::-1], ordered, side="left")
    if tail is None:
        below = np.searchsorted(ordered[::-1], -ordered, side="right")
        # A threshold at or under zero has its own mirror image among the selected.
        expected = np.where(ordered > 0, 1.0 + below, float(count))
    else:
        expected = count * np.asarray(tail(ordered), dtype=np.float64)
    rates = np.minimum(1.0, expected / at_least)
    monotone: np.ndarray = np.minimum.accumulate(rates[::-1])[::-1]
    return monotone
