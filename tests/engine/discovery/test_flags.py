from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control

from pairtrace.engine.discovery.flags import exact_mcnemar, shown_shares, verdict_changes
from pairtrace.engine.discovery.prompt_bag import bag_items
from pairtrace.errors import ConfigError
from tests.engine.behavior_cases import rollout, table_of

NAN = float("nan")


@pytest.mark.parametrize("risen,fallen", [(0, 0), (1, 0), (0, 5), (6, 0), (7, 7), (9, 2), (2, 30), (60, 41)])
def test_p_values_are_those_of_a_fair_coin(risen: int, fallen: int) -> None:
    expected = binomtest(risen, risen + fallen, 0.5).pvalue if risen + fallen else 1.0
    assert exact_mcnemar(risen, fallen) == pytest.approx(expected, rel=1e-12)
    assert exact_mcnemar(fallen, risen) == exact_mcnemar(risen, fallen)


def test_thousands_of_prompts_neither_overflow_nor_take_long() -> None:
    assert exact_mcnemar(6000, 4000) == pytest.approx(binomtest(4000, 10_000, 0.5).pvalue, rel=1e-9)
    assert exact_mcnemar(5000, 0) == 0.0  # far below the smallest float


def test_only_a_rise_beyond_chance_is_flagged() -> None:
    """Clusters: 8 of 10 rise; 8 of 10 fall; 3 of 10 rise; nothing moves. Noise rises, and is no cluster."""
    base = np.zeros((5, 10))
    tuned = np.zeros((5, 10))
    tuned[0, :8] = base[1, :8] = tuned[2, :3] = tuned[4] = 1
    labels = np.repeat([0, 1, 2, 3, -1], 10)
    changes = verdict_changes(base.ravel(), tuned.ravel(), labels, 4)
    assert [(change.risen, change.fallen) for change in changes] == [(8, 0), (0, 8), (3, 0), (0, 0)]
    assert [change.flagged for change in changes] == [True, False, False, False]
    p_values = [binomtest(8, 8, 0.5).pvalue] * 2 + [binomtest(3, 3, 0.5).pvalue, 1.0]
    assert [change.p_value for change in changes] == pytest.approx(p_values)
    assert [change.q_value for change in changes] == pytest.approx(false_discovery_control(p_values))
    assert (changes[0].base_rate, changes[0].tuned_rate) == (0.0, 0.8)


def test_many_clusters_are_corrected_for() -> None:
    """Six risen prompts are beyond chance (p = 0.03), but not as the best of twenty clusters."""
    count = 20
    labels = np.repeat(np.arange(count), 6)
    base, tuned = np.zeros(6 * count), np.zeros(6 * count)
    tuned[:6] = 1
    assert verdict_changes(base[:6], tuned[:6], labels[:6], 1)[0].flagged
    changes = verdict_changes(base, tuned, labels, count)
    assert not any(change.flagged for change in changes) and changes[0].p_value < 0.05


def test_missing_verdicts_are_missing() -> None:
    """Unjudged prompts are left out on both sides; a cluster without any is no test and is never flagged."""
    labels = np.repeat([0, 1], 8)
    base = np.array([0.0] * 7 + [NAN] + [NAN] * 8)
    tuned = np.array([1.0] * 6 + [NAN, 1.0] + [1.0] * 8)
    judged, unjudged = verdict_changes(base, tuned, labels, 2)
    assert (judged.judged, judged.missing, judged.risen) == (6, 2, 6)
    assert judged.q_value == judged.p_value == pytest.approx(2 / 64)
    assert (unjudged.judged, unjudged.missing, unjudged.p_value, unjudged.flagged) == (0, 8, 1.0, False)
    assert unjudged.base_rate is None and unjudged.tuned_rate is None


def test_shares_of_the_decided_answers() -> None:
    answers = [
        ("a", "base", [False, None, False]),
        ("a", "tuned", [True, False, None, True]),
        ("b", "base", [None]),
        ("b", "tuned", [True]),
    ]
    rows = [
        rollout(prompt, model, "plain", verdict, sample=number)
        for prompt, model, verdicts in answers
        for number, verdict in enumerate(verdicts)
    ]
    table = table_of(rows)
    base, tuned = shown_shares(table, bag_items(table))
    np.testing.assert_allclose(base, [0, NAN])
    np.testing.assert_allclose(tuned, [2 / 3, 1])


def test_equal_shares_of_different_numbers_are_no_change() -> None:
    third = np.array([1 / 3] * 6)
    change = verdict_changes(third, 1 - np.array([2 / 3] * 6), np.zeros(6, int), 1)[0]
    assert (change.risen, change.fallen, change.flagged) == (0, 0, False)


@pytest.mark.parametrize("rate", [0.0, 1.0, NAN])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="--flag-fdr"):
        verdict_changes(np.zeros(1), np.zeros(1), np.zeros(1, int), 1, rate)
