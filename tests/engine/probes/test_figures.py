"""ROC-AUC, its interval, and calibration against scikit-learn, the definition and a bootstrap over prompts."""

from __future__ import annotations

import numpy as np
import pytest

from pairtrace.engine.demo import roc_auc
from pairtrace.engine.probes import figures
from pairtrace.engine.probes.figures import area_of, figures_of


def scored(
    seed: int, prompts: int = 60, each: int = 5, shared: float = 1.0, *, pure: bool = False
) -> tuple[np.ndarray, ...]:
    """Examples whose scores have a part in common with the others of their prompt, of one class each where pure."""
    rng = np.random.default_rng(seed)
    number = np.repeat(np.arange(prompts), each)
    labels = rng.integers(0, 2, prompts)[number] if pure else rng.integers(0, 2, len(number))
    scores = 0.8 * labels + shared * rng.normal(size=prompts)[number] + 0.7 * rng.normal(size=len(number))
    return 1 / (1 + np.exp(-scores)), labels, number


def test_area_and_brier_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss, roc_auc_score

    scores, labels, prompts = scored(0)
    scores = np.round(scores, 1)  # ties
    found = figures_of(scores, labels, prompts)
    assert found.roc_auc.value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(labels, scores), abs=1e-12)
    assert (found.examples, found.positives, found.prompts) == (300, labels.sum(), 60)


def test_calibration_is_that_of_the_definition() -> None:
    scores, labels, prompts = scored(1)
    scores[:3] = 1.0, 0.0, 0.3
    found = figures_of(scores, labels, prompts, bins=10)
    expected = 0.0
    for number, one in enumerate(found.reliability):
        inside = [
            place for place, score in enumerate(scores) if number == (9 if score == 1 else int(np.floor(score * 10)))
        ]
        assert one.examples == len(inside)
        if inside:
            assert one.probability == pytest.approx(scores[inside].mean())
            assert one.share == pytest.approx(labels[inside].mean())
            assert one.share_low <= one.share <= one.share_high
            expected += len(inside) / len(scores) * abs(scores[inside].mean() - labels[inside].mean())
    assert sum(one.examples for one in found.reliability) == len(scores)
    assert found.calibration_error == pytest.approx(expected, abs=1e-12)


def interval_is_that_of_prompts(seed: int, pure: bool) -> bool:
    """Its ends against 2,000 bootstrap samples of whole prompts."""
    scores, labels, prompts = scored(seed, pure=pure)
    rng = np.random.default_rng(9)
    areas = []
    for _ in range(2000):
        drawn = rng.integers(0, 60, 60)
        rows = (drawn[:, None] * 5 + np.arange(5)).ravel()
        areas.append(roc_auc(scores[rows][labels[rows] == 1], scores[rows][labels[rows] == 0]))
    low, high = np.quantile(areas, (0.025, 0.975))
    found = area_of(scores, labels, prompts)
    assert found.method == "obuchowski"
    return bool(abs(found.low - low) < 0.15 * (high - low) and abs(found.high - high) < 0.15 * (high - low))


def test_interval_counts_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(interval_is_that_of_prompts(seed, pure) for seed in (2, 3) for pure in (True, False))
    real = figures.area_of

    def of_examples(scores: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> figures.Area:
        return real(scores, labels, np.arange(len(prompts)))

    monkeypatch.setitem(globals(), "area_of", of_examples)
    assert not any(interval_is_that_of_prompts(seed, True) for seed in (2, 3))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Without a common part the true area is that of two normal distributions."""
    from scipy.stats import norm

    truth = norm.cdf(0.8 / (0.7 * np.sqrt(2)))
    covered = 0
    for seed in range(300):
        found = area_of(*scored(seed, prompts=30, each=4, shared=0.0))
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 300 <= 0.985


def test_perfect_order_still_has_an_interval() -> None:
    labels, prompts = np.array([0] * 12 + [1] * 8), np.arange(20)
    found = area_of(np.arange(20.0), labels, prompts)
    assert (found.value, found.high, found.method) == (1.0, 1.0, "wilson-prompts")
    assert 0.6 < found.low < 0.75  # Wilson's for 8 of 8
    found = area_of(-np.arange(20.0), labels, prompts)
    assert (found.value, found.low) == (0.0, 0.0) and 0.25 < found.high < 0.4
    one = area_of(np.array([0.1, 0.9]), np.array([0, 1]), np.array([0, 1]))
    assert one.value == 1.0 and one.low < 0.3
    none = figures_of(np.array([0.5]), np.array([1]), np.array([0]))
    assert (none.roc_auc.value, none.roc_auc.low, none.roc_auc.high) == (None, 0.0, 1.0)
    empty = figures_of(np.empty(0), np.empty(0, int), np.empty(0, int))
    assert empty.brier is None and empty.calibration_error is None
