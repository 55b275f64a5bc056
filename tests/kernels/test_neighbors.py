"""Nearest neighbours against plain NumPy in float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from pairtrace.errors import ConfigError
from pairtrace.kernels import neighbors
from pairtrace.kernels.neighbors import distinct_rows, exact_neighbors, nearest_foreign, nearest_neighbors, recall


def unit_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def all_distances(points: np.ndarray) -> np.ndarray:
    """float64 [N, N], a row infinitely far from itself."""
    wide = points.astype(np.float64)
    distances = np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(axis=2))
    np.fill_diagonal(distances, np.inf)
    return distances


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and candidates, and lists that are cut."""
    monkeypatch.setattr(neighbors, "_QUERIES", 100)
    monkeypatch.setattr(neighbors, "_CANDIDATES", 70)
    monkeypatch.setattr(neighbors, "_LONGEST_LIST", 50)


@pytest.mark.parametrize(("count", "width", "k", "list_rows"), [(2, 1, 1, 512), (301, 17, 9, 40), (500, 65, 70, 500)])
def test_every_list_looked_at_is_exact(count: int, width: int, k: int, list_rows: int, small_blocks: None) -> None:
    points = unit_rows(count, width)
    if width == 1:
        points[:] = [[1], [-1]]
    found = nearest_neighbors(points, k, seed=3, probes=1000, list_rows=list_rows)
    expected = all_distances(points)
    assert found.ids.dtype == np.int32 and found.distances.dtype == np.float32
    assert found.probes == found.lists >= -(-count // list_rows)
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :k], rtol=1e-6)
    np.testing.assert_array_equal(found.ids, np.argsort(expected, axis=1, kind="stable")[:, :k])
    queries = np.arange(count)[::-3]
    ids, distances = exact_neighbors(points, queries, k)
    np.testing.assert_array_equal(ids, found.ids[queries])
    np.testing.assert_array_equal(distances, found.distances[queries])


def test_few_lists_are_approximate_and_the_recall_says_how_much(small_blocks: None) -> None:
    points, k = unit_rows(600, 12), 8
    found = nearest_neighbors(points, k, seed=0, probes=3, list_rows=40)
    assert found.lists > found.probes == 3
    truth = np.argsort(all_distances(points), axis=1)[:, :k]
    expected = [
        len(set(mine) & set(theirs)) / k for mine, theirs in zip(found.ids.tolist(), truth.tolist(), strict=True)
    ]
    measured = recall(found, points, np.arange(600))
    np.testing.assert_allclose(measured, expected)
    assert 0.3 < measured.mean() < 0.95
    more = nearest_neighbors(points, k, seed=0, probes=8, list_rows=40)
    assert recall(more, points, np.arange(600)).mean() > measured.mean()


def test_neither_threads_nor_their_number_change_a_bit(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points, told = unit_rows(700, 10), []
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        results.append(nearest_neighbors(points, 5, seed=1, probes=3, list_rows=50, advance=told.append))
    np.testing.assert_array_equal(results[0].ids, results[1].ids)
    np.testing.assert_array_equal(results[0].distances, results[1].distances)
    assert sum(told) == 2 * len(points)
    other = nearest_neighbors(points, 5, seed=2, probes=3, list_rows=50)
    assert (other.ids != results[0].ids).any(), "the seed makes the lists"


def test_thousands_of_equal_rows_fill_no_list_and_find_each_other() -> None:
    points = unit_rows(6000, 8)
    points[1000:] = points[0]
    found = nearest_neighbors(points, 6, seed=0, probes=2)
    assert (found.distances[1000:] == 0).all() and (found.ids[1000:] >= 0).all()
    assert (found.ids != np.arange(6000)[:, None]).all(), "a row is not its own neighbour"
    lists = neighbors._in_lists(points, 12, seed=0)
    assert np.diff(lists.starts).max() <= neighbors._LONGEST_LIST and lists.starts[-1] == 6000
    np.testing.assert_array_equal(np.sort(lists.names), np.arange(6000))
    own = np.repeat(np.arange(len(lists.centers)), np.diff(lists.starts))
    buffer = np.empty(6000 * len(lists.centers), np.float32)
    looked_into = neighbors._nearest_lists(lists.rows, lists.centers, 2, own, buffer)
    assert (looked_into == own[:, None]).any(axis=1).all(), "the parts of a long list have one centre"


def test_the_nearest_of_another_group() -> None:
    points, rng = unit_rows(300, 6), np.random.default_rng(1)
    groups = rng.integers(0, 3, 300).astype(np.int32)
    cores = rng.uniform(0, 0.9, 300).astype(np.float32)
    queries = np.arange(0, 300, 7)
    distances = np.maximum(all_distances(points), np.maximum(cores[:, None], cores[None]))
    distances[groups[:, None] == groups[None]] = np.inf
    rows, found = nearest_foreign(points, queries, groups, cores)
    np.testing.assert_allclose(found, distances[queries].min(axis=1), rtol=1e-6)
    np.testing.assert_allclose(distances[queries, rows], found, rtol=1e-6)
    assert (groups[rows] != groups[queries]).all()


@pytest.mark.parametrize("count", [1, 2, 500])
def test_distinct_rows(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_CANDIDATES", 64)
    points = unit_rows(20, 5)[np.random.default_rng(0).integers(0, 20, count)]
    first, inverse = distinct_rows(points)
    values, expected = np.unique(points, axis=0, return_index=True)
    np.testing.assert_array_equal(first, np.sort(expected))
    np.testing.assert_array_equal(points[first][inverse], points)
    assert len(first) == len(values) and inverse.dtype == np.int32


@pytest.mark.parametrize("k", [0, 10])
def test_more_neighbours_than_rows_are_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="k must be from 1 to 9"):
        nearest_neighbors(unit_rows(10, 4), k, seed=0)
