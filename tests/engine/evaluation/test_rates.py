from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pairtrace.engine.evaluation import rates
from pairtrace.engine.evaluation.rates import (
    ABSENT,
    MISSING,
    Resampling,
    difference_of,
    mcnemar_p_value,
    mean_of,
    newcombe_interval,
    rate_of,
)

RESAMPLING = Resampling(replicates=2000)


def column(*verdicts: int) -> np.ndarray:
    return np.array(verdicts, np.int8)[:, None]


@pytest.mark.parametrize(("yes", "no", "missing"), [(0, 12, 0), (3, 9, 2), (12, 0, 5), (150, 170, 1)])
def test_one_sample_per_request_gives_wilsons_interval(yes: int, no: int, missing: int) -> None:
    rate = rate_of(column(*[1] * yes, *[0] * no, *[MISSING] * missing), RESAMPLING)
    expected = stats.binomtest(yes, yes + no).proportion_ci(0.95, method="wilson")
    assert (rate.value, rate.missing, rate.decided, rate.method) == (yes / (yes + no), missing, yes + no, "wilson")
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_cell_without_verdicts_has_no_rate() -> None:
    for verdicts in (column(MISSING, MISSING), np.full((2, 3), MISSING, np.int8), np.zeros((0, 1), np.int8)):
        rate = rate_of(verdicts, RESAMPLING)
        assert (rate.value, rate.low, rate.high, rate.decided) == (None, 0.0, 1.0, 0)
        assert rate.missing == verdicts.size


SEVERAL = np.array([[1, 1, 1], [0, 0, MISSING], [1, 0, 0], [0, 1, ABSENT], [MISSING] * 3], np.int8)


def exhaustive_interval(verdicts: np.ndarray) -> tuple[float, float]:
    """All P^P resamples of requests, each as likely as any other; verdicts one by one."""
    rows = [[int(v) for v in row if v >= 0] for row in verdicts]
    rows = [row for row in rows if row]
    values = []
    for drawn in itertools.product(rows, repeat=len(rows)):
        pooled = [verdict for row in drawn for verdict in row]
        values.append(sum(pooled) / len(pooled))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def test_several_samples_resample_requests() -> None:
    rate = rate_of(SEVERAL, Resampling(replicates=40_000))
    assert (rate.value, rate.missing, rate.requests, rate.method) == (5 / 10, 4, 4, "bootstrap")
    assert (rate.low, rate.high) == pytest.approx(exhaustive_interval(SEVERAL), abs=0.02)
    # Taking samples for independent would be noticed: the interval is far wider than theirs.
    naive = stats.binomtest(5, 10).proportion_ci(0.95, method="wilson")
    certain = np.repeat(np.array([[1], [0]], np.int8), 20, axis=0).repeat(10, axis=1)
    clustered = rate_of(certain, RESAMPLING)
    assert clustered.high - clustered.low > 2 * (0.5 - stats.binomtest(200, 400).proportion_ci(method="wilson").low)
    assert rate.low < naive.low


def test_missing_counted_as_zero_would_be_noticed() -> None:
    wrong = np.where(SEVERAL == MISSING, 0, SEVERAL).astype(np.int8)
    assert rate_of(wrong, RESAMPLING).value != rate_of(SEVERAL, RESAMPLING).value


def test_requests_that_agree_still_have_an_interval() -> None:
    rate = rate_of(np.zeros((50, 4), np.int8), RESAMPLING)
    expected = stats.binomtest(0, 50).proportion_ci(method="wilson")
    assert (rate.low, rate.high) == pytest.approx((0, expected.high))
    assert rate.method == "wilson-requests"


def sign_flips(only_this: int, only_other: int) -> float:
    """Every way in which the discordant requests may fall."""
    total = only_this + only_other
    observed = abs(only_this - only_other)
    flips = [abs(sum(signs)) >= observed for signs in itertools.product((-1, 1), repeat=total)]
    return sum(flips) / len(flips)


@pytest.mark.parametrize(("only_this", "only_other"), [(0, 0), (1, 0), (3, 3), (0, 9), (2, 10), (7, 4)])
def test_mcnemar_is_the_exact_test(only_this: int, only_other: int) -> None:
    assert mcnemar_p_value(only_this, only_other) == pytest.approx(sign_flips(only_this, only_other), abs=1e-12)


def test_mcnemar_with_many_requests() -> None:
    expected = stats.binomtest(900, 1900).pvalue
    assert mcnemar_p_value(900, 1000) == pytest.approx(expected, rel=1e-9)


def test_difference_drops_requests_without_a_verdict() -> None:
    this = column(1, 1, 1, 0, MISSING, 1, 0)
    other = column(0, 0, 1, 1, 0, MISSING, 0)
    found = difference_of(this, other, RESAMPLING)
    assert (found.only_this, found.only_other, found.requests, found.dropped) == (2, 1, 5, 2)
    assert found.value == pytest.approx(3 / 5 - 2 / 5)
    assert found.p_value == pytest.approx(sign_flips(2, 1))
    nothing = difference_of(column(MISSING), column(1), RESAMPLING)
    assert (nothing.value, nothing.low, nothing.high, nothing.dropped) == (None, -1.0, 1.0, 1)


def test_newcombe_agrees_with_the_bootstrap_on_many_requests() -> None:
    rng = np.random.default_rng(3)
    other = rng.random(4000) < 0.3
    this = np.where(rng.random(4000) < 0.8, other, rng.random(4000) < 0.6)
    low, high = newcombe_interval(
        int((this & other).sum()), int((this & ~other).sum()), int((other & ~this).sum()), 4000, 0.95
    )
    gaps = this.astype(float) - other
    expected = mean_of(gaps, np.ones(4000), RESAMPLING)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=2e-3)
    # Without the pairing the interval would be a third wider.
    unpaired = 1.96 * np.sqrt(this.var() / 4000 + other.var() / 4000)
    assert (high - low) / 2 < 0.8 * unpaired


def test_newcombe_covers_and_keeps_its_width() -> None:
    low, high = newcombe_interval(0, 0, 0, 100, 0.95)
    assert low < 0 < high and high - low == pytest.approx(
        2 * stats.binomtest(0, 100).proportion_ci(method="wilson").high
    )
    rng = np.random.default_rng(0)
    shares = np.array([0.3, 0.25, 0.1, 0.35])  # both, only this, only other, neither
    covered = 0
    for both, this, other, _ in rng.multinomial(60, shares, size=2000):
        low, high = newcombe_interval(int(both), int(this), int(other), 60, 0.95)
        covered += low <= 0.15 <= high
    assert 0.93 < covered / 2000 < 0.975


def test_paired_bootstrap_over_requests() -> None:
    this = np.array([[1, 1], [1, 0], [0, 0], [1, 1]], np.int8)
    other = np.array([[0, 0], [1, MISSING], [0, 1], [0, 0]], np.int8)
    gaps = [1.0, -0.5, -0.5, 1.0]
    found = difference_of(this, other, Resampling(replicates=40_000))
    exact = np.quantile([np.mean(drawn) for drawn in itertools.product(gaps, repeat=4)], [0.025, 0.975])
    assert found.value == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.02)
    assert (found.p_value, found.method) == (None, "bootstrap")


def test_the_bootstrap_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    totals, counts = np.arange(30.0), np.ones(30)
    whole = mean_of(totals, counts, RESAMPLING)
    monkeypatch.setattr(rates, "_CELLS_AT_ONCE", 100)
    assert mean_of(totals, counts, RESAMPLING) == whole
    normal = stats.norm.interval(0.95, loc=totals.mean(), scale=totals.std() / np.sqrt(30))
    assert (whole.low, whole.high) == pytest.approx(normal, abs=0.35)
    assert mean_of(totals, np.zeros(30), RESAMPLING).value is None


def test_results_are_plain_values() -> None:
    values: list[Any] = [rate_of(SEVERAL, RESAMPLING).to_dict(), difference_of(SEVERAL, SEVERAL, RESAMPLING).to_dict()]
    assert {type(v) for value in values for v in value.values()} <= {float, int, str, type(None)}
