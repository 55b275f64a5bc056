"""Sources found one after the other: hidden ones, innocent pairs near the cut, chance."""

from __future__ import annotations

import numpy as np
import pytest

from pairtrace.engine.guilty_sources import guilty_sources, score_mass
from pairtrace.engine.intervals import wilson_interval

RULE = {"min_lift": 1.0, "coverage": 0.9, "confidence": 0.95}


def ranking(planted: list[int], near: list[int], size: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources of `size` rows with so many planted pairs (scores around 0.8) and so many innocent ones near the cut."""
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(len(planted)), size)
    scores = rng.uniform(-0.5, 0.4, len(place)).astype(np.float32)
    selected = []
    for source, (guilty, innocent) in enumerate(zip(planted, near, strict=True)):
        rows = source * size + np.arange(guilty + innocent)
        scores[rows[:guilty]] = rng.uniform(0.7, 0.9, guilty)
        scores[rows[guilty:]] = rng.uniform(0.41, 0.43, innocent)
        selected += rows.tolist()
    order = np.array(selected)[np.argsort(-scores[selected], kind="stable")]
    return place, scores, order


def found(planted: list[int], near: list[int], **changes: float) -> list[int]:
    place, scores, selected = ranking(planted, near)
    ranked = np.ones(len(place), bool)
    return guilty_sources(place, score_mass(scores, selected, ranked), ranked, **(RULE | changes))


def test_a_thinly_contaminated_source_does_not_hide_behind_a_dense_one() -> None:
    planted, near = [300, 65, 0, 0, 0], [0, 0, 0, 0, 0]
    assert found(planted, near) == [0, 1]
    # One look at the whole top misses it.
    low, _ = wilson_interval(65, 365)
    assert low / 0.2 < 1


def test_innocent_pairs_near_the_cut_implicate_no_source() -> None:
    planted, near = [300, 65, 0, 0, 0], [0, 0, 60, 0, 0]
    assert found(planted, near) == [0, 1]
    # Were every pair to count alike, the third source would look as guilty as the second.
    place, _, selected = ranking(planted, near)
    counts = np.zeros(len(place))
    counts[selected] = 1.0
    assert 2 in guilty_sources(place, counts, np.ones(len(place), bool), **RULE)


def test_enough_is_enough_when_the_top_is_covered() -> None:
    planted, near = [300, 65, 30, 0, 0], [0, 0, 0, 0, 0]
    assert found(planted, near) == [0, 1]
    assert found(planted, near, coverage=1.0) == [0, 1, 2]
    assert found(planted, near, coverage=0.5) == [0]


def test_the_least_lift_is_kept() -> None:
    assert found([300, 65, 0, 0, 0], [0, 0, 0, 0, 0], min_lift=4.5) == []


def test_chance_implicates_a_source_seldom() -> None:
    """Twenty sources, a top drawn at random: within the stated chance for all of them together."""
    rng = np.random.default_rng(1)
    place = np.repeat(np.arange(20), 200)
    ranked = np.ones(len(place), bool)
    false = 0
    for _ in range(200):
        mass = np.zeros(len(place))
        mass[rng.choice(len(place), 200, replace=False)] = rng.uniform(0, 1, 200)
        false += bool(guilty_sources(place, mass, ranked, **RULE))
    assert false <= 20


def test_mass_is_measured_from_the_best_score_left() -> None:
    scores = np.array([0.9, 0.1, 0.5, np.nan, 0.7], np.float32)
    mass = score_mass(scores, np.array([0, 4]), np.isfinite(scores))
    assert mass == pytest.approx([0.4, 0, 0, 0, 0.2], abs=1e-6)


def test_ties_at_the_cut_weigh_alike() -> None:
    scores = np.array([0.5, 0.5, 0.5, 0.1], np.float32)
    assert score_mass(scores, np.array([0, 1]), np.ones(4, bool)).tolist() == [1, 1, 0, 0]


def test_rows_without_a_rank_do_not_count() -> None:
    place, scores, selected = ranking([100, 0, 0], [0, 0, 0])
    ranked = place != 2
    mass = score_mass(scores, selected, ranked)
    # Without the third source the first holds half of the rows.
    assert guilty_sources(place, mass, ranked, **(RULE | {"min_lift": 1.85})) == [0]
    assert guilty_sources(place, mass, ranked, **(RULE | {"min_lift": 2.0})) == []
    assert guilty_sources(place, mass, np.ones(len(place), bool), **(RULE | {"min_lift": 2.0})) == [0]
