"""Rates with intervals, and their paired differences between two models.

Verdicts are int8 [P, S]: 1 yes, 0 no, `MISSING` for a verdict that could not be given, `ABSENT` where a request has
fewer samples than others. Samples of one request are not independent, so requests are what is resampled.

Legend: P requests, S samples, B bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pairtrace.engine.intervals import wilson_interval

MISSING = -1
ABSENT = -2
_CELLS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of responses.

    Attributes:
        value: yes / (yes + no); None when no verdict was given.
        low, high: interval; 0 and 1 when nothing is known.
        yes: responses with a verdict of yes.
        decided: responses with a verdict.
        missing: responses whose verdict could not be given.
        requests: requests with at least one verdict.
        method: "wilson" for one sample per request; "bootstrap" (percentile, over requests) for several;
            "wilson-requests" where all requests have the same share: the bootstrap would give an interval of width
            0, so each request counts as one trial.
    """

    value: float | None
    low: float
    high: float
    yes: int
    decided: int
    missing: int
    requests: int
    method: Literal["wilson", "bootstrap", "wilson-requests"]

    def to_dict(self) -> dict[str, Any]:
        """The rate as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The rate of one model minus that of another on the same requests.

    Attributes:
        value: mean over the requests that both have a verdict on; None when there are none.
        low, high: interval; -1 and 1 when nothing is known.
        requests: requests compared.
        dropped: requests left out because one of the two has no verdict at all.
        only_this, only_other: with one sample per request, requests that say yes for this or the other model alone.
        p_value: McNemar's exact two-sided test, with one sample per request; else None.
        method: "newcombe" with one sample per request, else "bootstrap" (paired, percentile, over requests).
    """

    value: float | None
    low: float
    high: float
    requests: int
    dropped: int
    only_this: int | None
    only_other: int | None
    p_value: float | None
    method: Literal["newcombe", "bootstrap"]

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean with its interval.

    Attributes:
        value: None when there is nothing to average.
        low, high: percentile bootstrap over requests; None without a value.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals are made.

    Attributes:
        confidence: level, between 0 and 1.
        replicates: B.
        seed: of the draws.
    """

    confidence: float = 0.95
    replicates: int = 2000
    seed: int = 0

    def weights(self, count: int) -> Iterator[np.ndarray]:
        """How often each of `count` requests is drawn: int64 [b, count] in pieces, B rows in all."""
        rng = np.random.default_rng(self.seed)
        at_once = max(1, _CELLS_AT_ONCE // max(count, 1))
        for begin in range(0, self.replicates, at_once):
            yield rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, self.replicates - begin))

    def ratio_interval(self, numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
        """Percentile interval of sum(numerators) / sum(denominators), both float [P].

        Requests are drawn with replacement.

        (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3; requests are the clusters.)
        """
        pieces = []
        for weights in self.weights(len(numerators)):
            below = weights @ denominators
            pieces.append((weights @ numerators)[below > 0] / below[below > 0])
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(np.concatenate(pieces), [tail, 1 - tail])
        return float(low), float(high)


def rate_of(verdicts: np.ndarray, resampling: Resampling) -> Rate:
    """The share of yes.

    Args:
        verdicts: int8 [P, S].
        resampling: level and bootstrap.
    """
    yes, decided = (verdicts == 1).sum(axis=1), (verdicts >= 0).sum(axis=1)
    known = decided > 0
    yes, total = yes[known], decided[known]
    count, trials = int(yes.sum()), int(total.sum())
    method: Literal["wilson", "bootstrap", "wilson-requests"] = "wilson"
    if verdicts.shape[1] <= 1 or trials == 0:
        low, high = wilson_interval(count, trials, resampling.confidence)
    elif np.ptp(yes / total) == 0:
        method = "wilson-requests"
        low, high = _wilson_of_share(count / trials, int(known.sum()), resampling.confidence)
    else:
        method = "bootstrap"
        low, high = resampling.ratio_interval(yes.astype(float), total.astype(float))
    return Rate(
        value=count / trials if trials else None,
        low=low,
        high=high,
        yes=count,
        decided=trials,
        missing=int((verdicts == MISSING).sum()),
        requests=int(known.sum()),
        method=method,
    )


def _wilson_of_share(share: float, requests: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval around a share that need not be a whole number of requests: the hull of both neighbours."""
    below = wilson_interval(math.floor(share * requests), requests, confidence)
    above = wilson_interval(math.ceil(share * requests), requests, confidence)
    return below[0], above[1]


def difference_of(this: np.ndarray, other: np.ndarray, resampling: Resampling) -> Difference:
    """The rate of `this` minus that of `other`, request by request.

    Args:
        this: int8 [P, S] of one model.
        other: int8 [P, S'] of the other, on the same requests.
        resampling: level and bootstrap.
    """
    assert len(this) == len(other)
    known = ((this >= 0).any(axis=1)) & ((other >= 0).any(axis=1))
    requests, dropped = int(known.sum()), int((~known).sum())
    single = max(this.shape[1], other.shape[1]) <= 1
    only_this = only_other = None
    p_value = None
    if requests == 0:
        value, low, high = None, -1.0, 1.0
    elif single:
        a, b = this[known, 0] == 1, other[known, 0] == 1
        only_this, only_other = int((a & ~b).sum()), int((b & ~a).sum())
        value = (only_this - only_other) / requests
        low, high = newcombe_interval(int((a & b).sum()), only_this, only_other, requests, resampling.confidence)
        p_value = mcnemar_p_value(only_this, only_other)
    else:
        gaps = _request_rates(this[known]) - _request_rates(other[known])
        value = float(gaps.mean())
        low, high = resampling.ratio_interval(gaps, np.ones(requests))
    return Difference(
        value=value,
        low=low,
        high=high,
        requests=requests,
        dropped=dropped,
        only_this=only_this,
        only_other=only_other,
        p_value=p_value,
        method="newcombe" if single else "bootstrap",
    )


def mean_of(totals: np.ndarray, counts: np.ndarray, resampling: Resampling) -> Mean:
    """Sum of `totals` over sum of `counts`, both float [P], requests being resampled."""
    if counts.sum() == 0:
        return Mean(value=None, low=None, high=None)
    low, high = resampling.ratio_interval(totals, counts)
    return Mean(value=float(totals.sum() / counts.sum()), low=low, high=high)


def _request_rates(verdicts: np.ndarray) -> np.ndarray:
    """Share of yes per request: float64 [P]."""
    shares: np.ndarray = (verdicts == 1).sum(axis=1) / (verdicts >= 0).sum(axis=1)
    return shares


def mcnemar_p_value(only_this: int, only_other: int) -> float:
    """Two-sided exact p-value of McNemar's test: the discordant requests are fair coin tosses under no difference.

    (Q. McNemar, Psychometrika 12, 1947; the exact form is the binomial test of the discordant pairs.)
    """
    total, smaller = only_this + only_other, min(only_this, only_other)
    tosses = -total * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) + tosses)
        for k in range(smaller + 1)
    )
    return min(1.0, 2 * tail)


def newcombe_interval(
    both: int, only_this: int, only_other: int, requests: int, confidence: float
) -> tuple[float, float]:
    """Interval of the difference of two paired shares.

    R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired
    data", Statistics in Medicine 17, 1998, method 10: Wilson's intervals of both shares, joined with their correlation.
    Unlike a bootstrap it keeps its width when no request differs.

    Args:
        both: requests with yes for both.
        only_this, only_other: requests with yes for one alone.
        requests: all requests, at least 1.
        confidence: level.
    """
    neither = requests - both - only_this - only_other
    yes_this, yes_other = both + only_this, both + only_other
    p, q = yes_this / requests, yes_other / requests
    p_low, p_high = wilson_interval(yes_this, requests, confidence)
    q_low, q_high = wilson_interval(yes_other, requests, confidence)
    spread = (
        math.sqrt(yes_this) * math.sqrt(requests - yes_this) * math.sqrt(yes_other) * math.sqrt(requests - yes_other)
    )
    phi = 0.0
    if spread > 0:
        product = both * neither - only_this * only_other
        # The continuity correction of the method: only a positive correlation is drawn towards zero.
        phi = (max(product - requests / 2, 0.0) if product > 0 else product) / spread
    below = (p - p_low) ** 2 - 2 * phi * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * phi * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return p - q - math.sqrt(max(below, 0.0)), p - q + math.sqrt(max(above, 0.0))
