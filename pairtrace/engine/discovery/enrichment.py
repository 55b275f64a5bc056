"""Which values of which columns are more frequent inside a cluster than outside.

Letters: n items (or rows), C clusters, V values of a column, k rows per cluster, m tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pairtrace.engine.discovery.columns import Column
from pairtrace.engine.intervals import wilson_interval

Among = Literal["members", "datapoints"]
# Most enriched values kept per cluster.
KEPT = 20
_log_factorial = np.frompyfunc(lambda count: math.lgamma(count + 1.0), 1, 1)


@dataclass(frozen=True, kw_only=True)
class Enrichment:
    """A value of a column that is more frequent inside a cluster than outside.

    Attributes:
        among: "members" of the cluster against all other items, or its top "datapoints" against all other rows of the
            store.
        column: name of the column; "source" is the source of a pair.
        value: of the column; "" stands for none.
        inside: items inside that have the value.
        inside_total: items inside.
        outside: items outside that have the value.
        outside_total: items outside.
        share_inside, share_outside: of the items inside and outside.
        share_inside_interval: Wilson interval, (low, high).
        ratio: share_inside / share_outside; None where no item outside has the value.
        p_value: of at least so many inside by chance (hypergeometric, one-sided).
        q_value: `p_value` corrected for all tests of the discovery (Benjamini and Hochberg).
    """

    among: Literal["members", "datapoints"]
    column: str
    value: str
    inside: int
    inside_total: int
    outside: int
    outside_total: int
    share_inside: float
    share_inside_interval: tuple[float, float]
    share_outside: float
    ratio: float | None
    p_value: float
    q_value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """How often each value stands inside each cluster, and at all.

    Attributes:
        among: what is counted.
        column: its name.
        values: V texts.
        inside: int64 [C, V].
        overall: int64 [V], inside and outside.
    """

    among: Among
    column: str
    values: tuple[str, ...]
    inside: np.ndarray
    overall: np.ndarray


def count_members(column: Column, labels: np.ndarray, clusters: int) -> Counts:
    """Count the values of all items.

    Args:
        column: of n items.
        labels: int32 [n], number of the cluster; -1 is outside all of them.
        clusters: C.
    """
    width = len(column.values)
    cells = (labels.astype(np.int64) + 1) * width + column.codes
    table = np.bincount(cells, minlength=(clusters + 1) * width).reshape(clusters + 1, width)
    return Counts(
        among="members", column=column.name, values=column.values, inside=table[1:], overall=table.sum(axis=0)
    )


def count_datapoints(column: Column, rows: np.ndarray, usable: np.ndarray) -> Counts:
    """Count the values of the rows that lie closest to each cluster, against all rows.

    Args:
        column: of the n rows of a store.
        rows: int64 [C, k], numbers of the rows; -1 stands for none. The clusters may share rows.
        usable: bool [n], the rows that could have been chosen.
    """
    width = len(column.values)
    inside = np.stack([np.bincount(column.codes[one[one >= 0]], minlength=width) for one in rows])
    return Counts(
        among="datapoints",
        column=column.name,
        values=column.values,
        inside=inside,
        overall=np.bincount(column.codes[usable], minlength=width),
    )


def enrichments(
    counts: Sequence[Counts], clusters: int, *, false_discovery_rate: float = 0.05, confidence: float = 0.95
) -> tuple[list[tuple[Enrichment, ...]], int]:
    """Values that are more frequent inside a cluster than outside, beyond chance.

    Every value of every column is tested in every cluster, and all tests are corrected together.

    Args:
        counts: of C clusters each; may be empty.
        clusters: C.
        false_discovery_rate: largest q-value of what is returned.
        confidence: of the intervals.

    Returns:
        Per cluster at most `KEPT` values, smallest q-value first; and the number of tests, m.
    """
    # A column with one value tells nothing apart.
    tested = [one for one in counts if np.count_nonzero(one.overall) > 1]
    if not tested or not clusters:
        return [() for _ in range(clusters)], 0
    cells, p_values = [], []
    for number, one in enumerate(tested):
        totals = one.inside.sum(axis=1)
        present = (totals[:, None] > 0) & (one.overall > 0)
        cells += [(number, cluster, value) for cluster, value in np.argwhere(present).tolist()]
        sizes = np.broadcast_to(totals[:, None], one.inside.shape)[present]
        having = np.broadcast_to(one.overall, one.inside.shape)[present]
        p_values.append(hypergeometric_tail(one.inside[present], sizes, having, int(one.overall.sum())))
    p = np.concatenate(p_values)
    q = benjamini_hochberg(p)
    found: list[list[Enrichment]] = [[] for _ in range(clusters)]
    for test in np.flatnonzero(q <= false_discovery_rate).tolist():
        number, cluster, value = cells[test]
        found[cluster].append(_enrichment(tested[number], cluster, value, float(p[test]), float(q[test]), confidence))
    for group in found:
        group.sort(key=lambda one: (one.q_value, one.p_value, -one.share_inside, one.among, one.column, one.value))
    return [tuple(group[:KEPT]) for group in found], len(p)


def hypergeometric_tail(inside: np.ndarray, size: np.ndarray, having: np.ndarray, total: int) -> np.ndarray:
    """Probability that at least `inside` of `size` items drawn without replacement have a value (Fisher, one-sided).

    The sum of hypergeometric probabilities from `inside` upwards; below the mean one minus the sum of the others, so
    that the terms fall off from the first one on. What is smaller than 1e-308 comes out as 0.

    Args:
        inside: int64 [m], drawn items that have the value.
        size: int64 [m], items drawn.
        having: int64 [m], items that have it.
        total: all items.

    Returns:
        float64 [m].
    """
    inside, size, having = (np.asarray(counts, np.int64) for counts in (inside, size, having))
    fewest = np.maximum(0, size + having - total)
    result = np.ones(len(inside))
    open_ = np.flatnonzero(inside > fewest)
    k, n, h = inside[open_], size[open_], having[open_]
    upper = k * float(total) > n.astype(np.float64) * h
    # The first term, and the direction in which the others are added.
    first = np.where(upper, k, k - 1)
    log_term = (
        _logs(h) - _logs(first) - _logs(h - first)
        + _logs(total - h) - _logs(n - first) - _logs(total - h - n + first)
        - _logs(np.full(len(n), total)) + _logs(n) + _logs(total - n)
    )  # fmt: skip
    sums = _falling_sums(np.exp(log_term), first, upper, n, h, total)
    result[open_] = np.where(upper, sums, 1.0 - sums).clip(0.0, 1.0)
    return result


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Q-values: the smallest false discovery rate at which each test counts as a discovery.

    Benjamini and Hochberg, "Controlling the false discovery rate", JRSS B 57 (1995): the i-th smallest of m values
    becomes m p / i, made monotone from the largest down.

    Args:
        p_values: float64 [m], each from 0 to 1.

    Returns:
        float64 [m].
    """
    p_values = np.asarray(p_values, np.float64)
    count = len(p_values)
    order = np.argsort(p_values, kind="stable")[::-1]
    scaled = p_values[order] * count / np.arange(count, 0, -1)
    result = np.empty(count)
    result[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    return result


def _enrichment(
    counts: Counts, cluster: int, value: int, p_value: float, q_value: float, confidence: float
) -> Enrichment:
    inside, size = int(counts.inside[cluster, value]), int(counts.inside[cluster].sum())
    outside, rest = int(counts.overall[value]) - inside, int(counts.overall.sum()) - size
    share_outside = outside / rest if rest else 0.0
    return Enrichment(
        among=counts.among,
        column=counts.column,
        value=counts.values[value],
        inside=inside,
        inside_total=size,
        outside=outside,
        outside_total=rest,
        share_inside=inside / size,
        share_inside_interval=wilson_interval(inside, size, confidence),
        share_outside=share_outside,
        ratio=inside / size / share_outside if outside else None,
        p_value=p_value,
        q_value=q_value,
    )


def _logs(counts: np.ndarray) -> np.ndarray:
    """Logarithms of factorials."""
    logs: np.ndarray = _log_factorial(counts).astype(np.float64)
    return logs


def _falling_sums(
    term: np.ndarray, count: np.ndarray, upper: np.ndarray, size: np.ndarray, having: np.ndarray, total: int
) -> np.ndarray:
    """Sums of hypergeometric probabilities from `term`, that of `count`, away from the mean; float64 [m]."""
    sums, term, count = term.copy(), term.copy(), count.astype(np.float64)
    left = np.flatnonzero(term > 0)
    while left.size:
        c, n, h = count[left], size[left], having[left]
        up = (h - c) * (n - c) / ((c + 1) * (total - h - n + c + 1))
        # Downwards from c to c - 1: the inverse of the upward ratio at c - 1.
        down = c * (total - h - n + c) / ((h - c + 1) * (n - c + 1))
        term[left] *= np.where(upper[left], up, down)
        count[left] += np.where(upper[left], 1.0, -1.0)
        sums[left] += term[left]
        left = left[term[left] > sums[left] * 1e-17]
    return sums
