"""The forest and the trees against SciPy and plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial.distance import squareform

from pairtrace.kernels import density_tree_numba as kernels


def random_graph(count: int, k: int, seed: int, values: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A graph of few neighbours on a line, so that it falls into parts; few distinct `values` make ties."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(0, 1, count) if values is None else rng.integers(0, values, count) / values
    distances = np.abs(places[:, None] - places[None]) + 0.01
    np.fill_diagonal(distances, np.inf)
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return ids.astype(np.int32), np.take_along_axis(distances, ids, axis=1).astype(np.float32)


@pytest.mark.parametrize(("count", "k", "values"), [(2, 1, None), (60, 1, None), (200, 3, None), (200, 4, 7)])
def test_the_forest_is_a_minimum_spanning_forest(count: int, k: int, values: int | None) -> None:
    ids, distances = random_graph(count, k, seed=count, values=values)
    ids[0, -1], distances[0, -1] = -1, np.inf
    cores = np.random.default_rng(0).uniform(0, 0.05, count).astype(np.float32)
    left, right, heights = np.empty(count - 1, np.int32), np.empty(count - 1, np.int32), np.empty(count - 1, np.float32)
    edges = kernels.forest(ids, distances, cores, left, right, heights)
    rows, columns = np.nonzero(ids >= 0)
    others = ids[rows, columns]
    reach = np.maximum(distances[rows, columns], np.maximum(cores[rows], cores[others])).astype(np.float64)
    shortest: dict[tuple[int, int], float] = {}
    for a, b, length in zip(rows.tolist(), others.tolist(), reach.tolist(), strict=True):
        pair = (min(a, b), max(a, b))
        shortest[pair] = min(length, shortest.get(pair, np.inf))
    ends = np.array(list(shortest))
    graph = coo_matrix((list(shortest.values()), (ends[:, 0], ends[:, 1])), shape=(count, count)).tocsr()
    expected = minimum_spanning_tree(graph)
    assert edges == expected.nnz
    np.testing.assert_allclose(np.sort(heights[:edges]), np.sort(expected.data))
    parts, names = connected_components(graph, directed=False)
    found = kernels.components(count, left[:edges], right[:edges])
    assert edges == count - parts
    np.testing.assert_array_equal(found, [np.flatnonzero(names == name)[0] for name in names])


def test_single_linkage_passes_over_circles() -> None:
    rng = np.random.default_rng(0)
    distances = rng.uniform(0.1, 1, (30, 30))
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    left, right = np.triu_indices(30, 1)
    heights = distances[left, right]
    order = np.argsort(heights)
    children, merged, sizes = kernels.single_linkage(
        30, left[order].astype(np.int32), right[order].astype(np.int32), heights[order], np.ones(30, np.int64)
    )
    expected = linkage(squareform(distances), "single")
    np.testing.assert_allclose(merged, expected[:, 2])
    np.testing.assert_array_equal(sizes, expected[:, 3])
    np.testing.assert_array_equal(np.sort(children, axis=1), np.sort(expected[:, :2], axis=1))


def test_core_distances_count_copies() -> None:
    """Point 0 stands for 3 rows, point 1 for 1, point 2 for 2."""
    ids = np.array([[1, 2], [0, 2], [1, -1]], np.int32)
    distances = np.array([[0.1, 0.3], [0.1, 0.2], [0.2, np.inf]], np.float32)
    weights = np.array([3, 1, 2])
    for samples, expected in [(1, [0, 0.1, 0]), (2, [0, 0.1, 0.2]), (3, [0.1, 0.1, 0.2]), (4, [0.3, 0.2, 0.2])]:
        cores = kernels.core_distances(ids, distances, weights, samples)
        np.testing.assert_allclose(cores, np.array(expected, np.float32), err_msg=str(samples))
