from __future__ import annotations

import numpy as np
import pytest

from pairtrace.engine.discovery.clustering import ClusterConfig, cluster
from pairtrace.engine.discovery.prompt_points import (
    cluster_with_images,
    default_size,
    points_with_length,
    reduced_rows,
)
from pairtrace.errors import DataError

RNG = np.random.default_rng(7)
CONFIG = ClusterConfig(min_cluster_size=8, min_samples=5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def around(direction: np.ndarray, count: int, spread: float = 0.15) -> np.ndarray:
    return unit(direction + spread * RNG.normal(size=(count, len(direction))))


def points_of(*groups: tuple[np.ndarray, float], scale: float = 5.0) -> np.ndarray:
    """Points of groups of unit rows, each with a length."""
    rows = np.concatenate([rows for rows, _ in groups])
    lengths = np.concatenate([np.full(len(rows), length) for rows, length in groups])
    return points_with_length(rows, lengths, scale)


def test_the_gram_matrix_reduces_as_the_matrix_itself() -> None:
    """Against a singular value decomposition of the unit rows: the same coordinates, up to the sign of an axis."""
    matrix = RNG.normal(size=(20, 300)) * np.linspace(1, 9, 300)
    u, s, _ = np.linalg.svd(unit(matrix), full_matrices=False)
    expected = unit((u * s)[:, :5])
    found = reduced_rows(matrix @ matrix.T, 5)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-10)


def test_rows_that_lean_on_nothing_have_no_point() -> None:
    matrix = RNG.normal(size=(4, 10))
    matrix[2] = 0
    found = reduced_rows(matrix @ matrix.T, 6)  # more axes than rows
    assert np.isnan(found[2]).all() and np.isfinite(found[[0, 1, 3]]).all()
    np.testing.assert_allclose(np.linalg.norm(found[[0, 1, 3]], axis=1), 1)
    assert np.isnan(reduced_rows(np.zeros((3, 3)), 2)).all()


def test_points_are_the_unit_vectors_of_change_and_scale() -> None:
    rows, lengths = unit(RNG.normal(size=(6, 3))), np.array([0.1, 1, 5, 10, 100, 1e4])
    points = points_with_length(rows, lengths, 5.0)
    expected = unit(np.column_stack([rows * lengths[:, None], np.full(6, 5.0)]))
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, expected, atol=1e-6)


def test_prompts_that_all_changed_alike_are_one_cluster() -> None:
    """A density hierarchy of the points alone has no cluster in a single group."""
    points = points_of((around(np.eye(6)[0], 40), 10.0))
    assert cluster(points, CONFIG).labels.max() == -1
    found = cluster_with_images(points, CONFIG)
    assert (found.labels == 0).all() and len(found.persistence) == 1
    assert found.probabilities.shape == (40,) and found.probabilities.max() == 1


def test_opposite_changes_are_two_clusters() -> None:
    axis = np.eye(6)[0]
    found = cluster_with_images(points_of((around(axis, 20), 10.0), (around(-axis, 30), 10.0)), CONFIG)
    assert found.labels.tolist() == [1] * 20 + [0] * 30  # the larger one comes first


def test_the_length_tells_changes_apart_that_point_alike() -> None:
    """One direction: a refusal in other words, and compliance; without the length they are one."""
    direction = np.eye(6)[0]
    groups = (around(direction, 60, 0.3), 2.5), (around(direction, 30, 0.3), 14.0)
    found = cluster_with_images(points_of(*groups), CONFIG)
    assert len(set(found.labels[60:].tolist()) - {-1}) == 1
    large = found.labels[60:].max()
    assert (found.labels[60:] == large).mean() > 0.9 and not (found.labels[:60] == large).any()
    same_length = cluster_with_images(points_of(*((rows, 5.0) for rows, _ in groups)), CONFIG)
    assert same_length.labels[60:].max() == same_length.labels[:60].max() == 0


def test_changes_without_a_direction_are_noise() -> None:
    """Tiny changes in all directions lie together, and with their own images."""
    small, large = unit(RNG.normal(size=(60, 6))), around(np.eye(6)[0], 20)
    found = cluster_with_images(points_of((small, 0.3), (large, 12.0)), CONFIG)
    assert (found.labels[:60] == -1).all() and (found.labels[60:] == 0).all()
    assert found.details["undirected"] > 30 and (found.probabilities[:60] == 0).all()
    assert len(found.persistence) == 1


def test_rows_without_a_point_are_noise() -> None:
    points = points_of((around(np.eye(6)[0], 30), 10.0))
    points[4] = np.nan
    found = cluster_with_images(points, CONFIG)
    assert found.labels[4] == -1 and (np.delete(found.labels, 4) == 0).all()


def test_too_few_prompts_are_refused() -> None:
    points = points_of((around(np.eye(6)[0], 7), 10.0))  # with their images there would be enough
    with pytest.raises(DataError, match=r"7 prompts changed, but a cluster needs min_cluster_size = 8"):
        cluster_with_images(points, CONFIG)


def test_sizes_grow_with_the_square_root() -> None:
    assert [default_size(items) for items in (0, 100, 128, 500, 10_000)] == [8, 8, 8, 17, 75]
