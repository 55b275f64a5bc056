from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pairtrace.engine.scores_writer import rank_rows
from pairtrace.engine.selection import LARGEST_SHIFT, SelectionRule, false_discovery_rates, require_symmetric, select
from pairtrace.errors import ConfigError

SCORES = st.lists(
    st.sampled_from([-0.9, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, float("nan")]), min_size=1, max_size=40
)


def as_scores(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def chosen(rule: SelectionRule, scores: np.ndarray, tail: Any = None) -> list[int]:
    rows: list[int] = select(rule, scores, rank_rows(scores), tail).rows.tolist()
    return rows


def plain_rates(ordered: list[float], tail: Any) -> list[float]:
    """The estimate from its definition: at each threshold count, then take the lowest rate of any longer selection."""
    rates = []
    for threshold in ordered:
        at_least = sum(score >= threshold for score in ordered)
        if tail is not None:
            expected = len(ordered) * tail(threshold)
        else:
            expected = 1 + sum(score <= -threshold for score in ordered) if threshold > 0 else len(ordered)
        rates.append(min(1.0, expected / at_least))
    return [min(rates[place:]) for place in range(len(rates))]


@given(SCORES)
def test_every_rule_takes_the_head_of_a_plain_sort(values: list[float]) -> None:
    scores = as_scores(values)
    order = sorted(
        (row for row in range(len(values)) if not np.isnan(scores[row])), key=lambda row: (-scores[row], row)
    )
    if not order:
        with pytest.raises(ConfigError, match="no pair has a rank"):
            chosen(SelectionRule(k=1), scores)
        return
    for k in range(1, len(order) + 1):
        assert chosen(SelectionRule(k=k), scores) == order[:k]
    with pytest.raises(ConfigError, match=f"-k is {len(order) + 1}, but only {len(order)} of {len(values)} pairs"):
        chosen(SelectionRule(k=len(order) + 1), scores)
    assert chosen(SelectionRule(fraction=0.5), scores) == order[: max(1, round(0.5 * len(order)))]
    above = [row for row in order if scores[row] >= 0.25]
    if above:
        assert chosen(SelectionRule(threshold=0.25), scores) == above


@given(SCORES, st.sampled_from([0.05, 0.2, 0.5, 0.9]), st.booleans())
@settings(deadline=None)
def test_false_discovery_rates_follow_their_definition(values: list[float], fdr: float, by_chance: bool) -> None:
    scores = as_scores(values)
    order = sorted(
        (row for row in range(len(values)) if not np.isnan(scores[row])), key=lambda row: (-scores[row], row)
    )

    def tail(score: Any) -> Any:
        return np.exp(-3 * (np.asarray(score, dtype=np.float64) + 1))

    ordered = [float(scores[row]) for row in order]
    rates = plain_rates(ordered, tail if by_chance else None)
    actual = false_discovery_rates(as_scores(ordered), tail if by_chance else None)
    np.testing.assert_allclose(actual, rates, rtol=1e-6)
    rule = SelectionRule(fdr=fdr, null="random" if by_chance else "sign-flip")
    count = max((place + 1 for place, rate in enumerate(rates) if rate <= fdr + 1e-12), default=0)
    if order and count:
        found = select(rule, scores, rank_rows(scores), tail if by_chance else None)
        assert found.rows.tolist() == order[:count]
        assert found.fdr is not None and found.fdr <= fdr
    else:
        with pytest.raises(ConfigError):
            chosen(rule, scores, tail if by_chance else None)


def test_the_estimate_holds_on_a_planted_mixture() -> None:
    """Among 20,000 symmetric nulls and 1,000 shifted scores the true share of nulls stays near the rate asked for."""
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = np.concatenate([rng.normal(0, 0.1, 20_000), rng.normal(0.5, 0.1, 1000)]).astype(np.float32)
        rows = select(SelectionRule(fdr=0.1), scores, rank_rows(scores)).rows
        assert len(rows) > 800
        shares.append(float((rows < 20_000).mean()))
    assert 0.07 < np.mean(shares) <= 0.105


def test_one_false_discovery_is_always_reckoned_with() -> None:
    scores = as_scores([0.9, 0.8, 0.7])
    with pytest.raises(ConfigError, match=r"lowest reachable rate 0\.3333"):
        chosen(SelectionRule(fdr=0.2), scores)
    assert chosen(SelectionRule(fdr=0.34), scores) == [0, 1, 2]


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.2, 0.28, 0.32, 1.0])
def test_the_sign_flip_null_needs_scores_around_zero(shift: float) -> None:
    noise = np.random.default_rng(3).normal(size=4001)
    deviation = stats.median_abs_deviation(noise, scale="normal")
    scores = (0.1 * (noise - np.median(noise) + shift * deviation)).astype(np.float32)
    if shift <= LARGEST_SHIFT:
        require_symmetric(scores, otherwise="x")
        return
    with pytest.raises(ConfigError, match=rf"median is 0\.\d+ \({shift:.1f} standard .*pairs score above 0.*; x$"):
        require_symmetric(scores, otherwise="x")


def test_few_or_planted_pairs_do_not_make_a_ranking_lopsided() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        require_symmetric(rng.normal(size=20), otherwise="x")
    require_symmetric(np.concatenate([rng.normal(size=4000), np.full(600, 4.0)]), otherwise="x")
    require_symmetric(np.zeros(30), otherwise="x")
    with pytest.raises(ConfigError, match="100% of the pairs score above 0"):
        require_symmetric(np.full(30, 2.0), otherwise="x")


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "got none"),
        ({"k": 1, "fdr": 0.1}, "got k, fdr"),
        ({"k": 0}, "at least 1"),
        ({"fraction": 0.0}, "above 0 and at most 1"),
        ({"threshold": math.nan}, "expected a number"),
        ({"fdr": 1.0}, "above 0 and below 1"),
        ({"fdr": 0.1, "null": "none"}, "expected sign-flip or random"),
    ],
)
def test_rules_that_make_no_sense(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectionRule(**given_)
