"""Stability against sets, and on clusters that are found again, split, or not there at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.discovery import stability
from pairtrace.engine.discovery.clustering import ClusterConfig, cluster
from pairtrace.engine.discovery.stability import (
    StabilityConfig,
    best_jaccard,
    measure_stability,
    recluster_points,
)
from pairtrace.errors import ConfigError


@pytest.mark.parametrize("seed", range(5))
def test_best_match_of_every_cluster(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, again = rng.integers(-1, 4, 80), rng.integers(-1, seed, 80)
    sizes, found = best_jaccard(labels, again, 6)
    for number in range(6):
        own = set(np.flatnonzero(labels == number).tolist())
        others = [set(np.flatnonzero(again == other).tolist()) for other in range(seed)]
        best = max((len(own & other) / len(own | other) for other in others if own | other), default=0.0)
        assert (sizes[number], found[number]) == (len(own), pytest.approx(best))


def test_noise_is_no_cluster() -> None:
    labels = np.array([0, 0, 0, -1, -1, -1])
    assert best_jaccard(labels, np.full(6, -1), 1)[1].tolist() == [0.0]
    assert best_jaccard(labels, np.array([-1, -1, -1, 0, 0, 0]), 1)[1].tolist() == [0.0]


LABELS = np.repeat(np.array([0, 1, -1], np.int32), [60, 30, 10])


def test_what_is_found_again_is_highly_stable() -> None:
    first, second = measure_stability(LABELS, 2, lambda positions, _: LABELS[positions], StabilityConfig(runs=7))
    for found in (first, second):
        assert found is not None
        assert (found.jaccard, found.lowest, found.runs, found.recovered, found.dissolved) == (1.0, 1.0, 7, 7, 0)
        assert found.grade == "highly stable"


def test_what_is_lost_is_unstable() -> None:
    config = StabilityConfig(runs=3)
    (found, _) = measure_stability(LABELS, 2, lambda positions, _: np.full(len(positions), -1, np.int32), config)
    assert found is not None
    assert (found.jaccard, found.recovered, found.dissolved, found.grade) == (0.0, 0, 3, "unstable")


def test_a_cluster_that_swallows_another_costs_the_smaller_one_more() -> None:
    merged = np.where(LABELS >= 0, 0, -1)
    large, small = measure_stability(LABELS, 2, lambda positions, _: merged[positions], StabilityConfig(runs=50))
    assert large is not None and small is not None
    assert large.jaccard == pytest.approx(60 / 90, abs=0.02)
    assert small.jaccard == pytest.approx(30 / 90, abs=0.02)
    assert (large.grade, small.grade) == ("doubtful", "unstable")
    assert large.lowest < large.jaccard
    assert (large.dissolved, small.dissolved) == (0, 50)


@pytest.mark.parametrize(
    ("jaccard", "grade"),
    [(1.0, "highly stable"), (0.85, "highly stable"), (0.8499, "stable"), (0.75, "stable"), (0.7499, "doubtful")]
    + [(0.6, "doubtful"), (0.5999, "unstable"), (0.0, "unstable")],
)
def test_grades(jaccard: float, grade: str) -> None:
    assert stability._stability([jaccard]).grade == grade


def test_a_run_draws_items_with_replacement_and_has_a_seed_of_its_own() -> None:
    runs: list[tuple[np.ndarray, int]] = []

    def recluster(positions: np.ndarray, seed: int) -> np.ndarray:
        runs.append((positions, seed))
        return np.zeros(len(positions), np.int32)

    labels = np.zeros(2000, np.int32)
    measure_stability(labels, 1, recluster, StabilityConfig(runs=3, seed=5))
    measure_stability(labels, 1, recluster, StabilityConfig(runs=3, seed=5))
    measure_stability(labels, 1, recluster, StabilityConfig(runs=3, seed=6))
    measure_stability(labels, 1, recluster, StabilityConfig(runs=3, seed=5, items=100))
    assert [seed for _, seed in runs[:3]] == [6, 7, 8]
    for positions, _ in runs:
        assert (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < 2000
    for positions, _ in runs[:9]:
        assert len(positions) / 2000 == pytest.approx(1 - np.exp(-1), abs=0.03)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(runs[:3], runs[3:6], strict=True))
    drawn = [positions.tolist() for positions, _ in runs]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[6]
    assert all(90 <= len(positions) <= 100 for positions in drawn[9:])


def test_too_few_members_are_not_judged() -> None:
    labels = np.concatenate([np.zeros(5000, np.int32), np.ones(20, np.int32)])
    config = StabilityConfig(runs=4, items=100)
    large, small = measure_stability(labels, 2, lambda positions, _: labels[positions], config)
    assert large is not None
    assert small is None
    assert measure_stability(labels, 2, lambda positions, _: labels[positions], StabilityConfig(runs=0)) == [None, None]
    assert measure_stability(np.full(5, -1, np.int32), 0, lambda positions, _: positions, config) == []


def test_sizes_shrink_with_the_share_of_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ClusterConfig] = []

    def fake(points: np.ndarray, config: ClusterConfig) -> SimpleNamespace:
        asked.append(config)
        return SimpleNamespace(labels=np.zeros(len(points), np.int32))

    points = np.zeros((100, 3), np.float32)
    recluster = recluster_points(
        points, ClusterConfig(min_cluster_size=40, min_samples=10, seed=1, selection="leaf"), fake
    )
    recluster(np.arange(25), 9)
    recluster_points(points, ClusterConfig(min_cluster_size=4), fake)(np.arange(25), 2)
    monkeypatch.setattr(stability, "EXACT_UP_TO", 99)
    recluster(np.arange(50), 3)
    assert asked[0] == ClusterConfig(min_cluster_size=10, min_samples=5, seed=9, selection="leaf")
    assert asked[1] == ClusterConfig(min_cluster_size=4, min_samples=None, seed=2)
    assert asked[2] == ClusterConfig(min_cluster_size=20, min_samples=5, seed=3, selection="leaf", method="graph")


def test_planted_groups_are_stable_and_a_slice_of_one_is_not() -> None:
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8)[np.repeat(np.arange(3), 60)]
    noise = rng.normal(size=(30, 8))
    points = np.concatenate([centers + 0.05 * rng.normal(size=centers.shape), noise])
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    config = ClusterConfig(min_cluster_size=20, method="exact")
    found = cluster(points, config)
    config_of_runs = StabilityConfig(runs=5)
    grades = measure_stability(found.labels, 3, recluster_points(points, config), config_of_runs)
    assert [one.grade for one in grades if one is not None] == ["highly stable"] * 3
    sliced = np.where(np.arange(len(points)) < 20, 0, -1).astype(np.int32)
    (one,) = measure_stability(sliced, 1, recluster_points(points, config), config_of_runs)
    assert one is not None and one.grade == "unstable"


@pytest.mark.parametrize("count", [5, 6, 9])
@pytest.mark.parametrize("method", ["exact", "graph"])
def test_a_handful_of_items_may_be_drawn_less_often_than_a_cluster_needs(count: int, method: Any) -> None:
    points = np.random.default_rng(0).normal(size=(count, 3))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    points[0] = np.nan
    config = ClusterConfig(min_cluster_size=5, min_samples=5, method=method)
    labels = np.zeros(count, np.int32)
    (found,) = measure_stability(labels, 1, recluster_points(points, config), StabilityConfig(runs=10))
    assert found is None or found.grade == "unstable"


@pytest.mark.parametrize(("changes", "message"), [({"runs": -1}, "is -1"), ({"items": 1}, "is 1")])
def test_settings_out_of_range(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StabilityConfig(**changes)
