"""Clusters against the hdbscan package, and what is no cluster."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import hdbscan
import numba
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from pairtrace.engine.discovery import clustering, density_tree
from pairtrace.engine.discovery.clustering import ClusterConfig, cluster
from pairtrace.engine.discovery.density_tree import graph_linkage
from pairtrace.errors import ConfigError, DataError, MissingDependencyError
from pairtrace.kernels import neighbors
from pairtrace.kernels.neighbors import nearest_neighbors


def planted(count: int, width: int, clusters: int, cosine: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around random directions, one fifth around none, and the truth."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((clusters, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    truth = np.where(rng.random(count) < 0.2, -1, rng.integers(0, clusters, count))
    rows = rng.standard_normal((count, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    member = truth >= 0
    rows[member] = cosine * directions[truth[member]] + np.sqrt(1 - cosine**2) * rows[member]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), truth


def package(points: np.ndarray, config: ClusterConfig) -> Any:
    return hdbscan.HDBSCAN(
        min_cluster_size=config.min_cluster_size,
        min_samples=config.samples,
        cluster_selection_method=config.selection,
        algorithm="prims_kdtree",
    ).fit(points.astype(np.float64))


def assert_like_the_package(found: clustering.Clustering, expected: Any) -> None:
    np.testing.assert_array_equal(found.labels >= 0, expected.labels_ >= 0)
    assert adjusted_rand_score(expected.labels_, found.labels) == 1
    np.testing.assert_allclose(found.probabilities, expected.probabilities_, rtol=1e-5)
    theirs = [expected.labels_[np.flatnonzero(found.labels == label)[0]] for label in range(len(found.persistence))]
    np.testing.assert_allclose(found.persistence, expected.cluster_persistence_[theirs], rtol=1e-5)


@pytest.mark.parametrize("selection", ["eom", "leaf"])
@pytest.mark.parametrize(("min_cluster_size", "min_samples"), [(5, 2), (15, None), (40, 10)])
def test_exact_clusters_are_those_of_the_package(
    selection: Any, min_cluster_size: int, min_samples: int | None
) -> None:
    points, _ = planted(500, 8, 5, 0.9, seed=min_cluster_size)
    config = ClusterConfig(min_cluster_size=min_cluster_size, min_samples=min_samples, selection=selection)
    found = cluster(points, config)
    assert found.method == "exact" and found.labels.dtype == np.int32 and found.probabilities.dtype == np.float32
    assert len(found.persistence) > 1
    assert_like_the_package(found, package(points, config))


def test_a_complete_graph_has_the_tree_of_the_package() -> None:
    """Its lengths, that is: where several merges have one length, their order is free."""
    points, _ = planted(400, 8, 5, 0.9, seed=0)
    config = ClusterConfig(min_cluster_size=15, min_samples=7)
    tree, parts = graph_linkage(points, nearest_neighbors(points, 399, seed=0), np.ones(400, np.int64), 7)
    expected = package(points, config).single_linkage_tree_.to_numpy()
    assert parts == 1
    np.testing.assert_allclose(tree.heights, expected[:, 2], rtol=1e-6)
    found = cluster(points, ClusterConfig(min_cluster_size=15, min_samples=7, method="graph", neighbors=399))
    assert found.method == "graph"
    assert adjusted_rand_score(package(points, config).labels_, found.labels) > 0.95


@pytest.mark.parametrize("selection", ["eom", "leaf"])
def test_copies_are_clustered_as_the_package_does(selection: Any) -> None:
    """One mass of copies that is a cluster by itself, and many small ones; rows 0.01 apart count as equal."""
    points, _ = planted(300, 8, 4, 0.9, seed=3)
    points = np.concatenate([points, np.repeat(points[:60], 3, axis=0), np.repeat(points[-1:], 80, axis=0)])
    config = ClusterConfig(
        min_cluster_size=25, min_samples=5, selection=selection, method="graph", neighbors=len(points)
    )
    found = cluster(points, config)
    assert found.details["distinct"] == 300
    exact = cluster(points, ClusterConfig(min_cluster_size=25, min_samples=5, selection=selection, method="exact"))
    np.testing.assert_array_equal(found.labels, exact.labels)
    np.testing.assert_allclose(found.probabilities, exact.probabilities, rtol=1e-5)
    np.testing.assert_allclose(found.persistence, exact.persistence, rtol=1e-5)
    assert len(set(found.labels[-80:].tolist())) == 1 and found.labels[-1] >= 0
    assert (found.probabilities[found.labels >= 0] > 0).all(), "a mass of copies takes no member its share"


def test_few_neighbours_and_few_lists_agree_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "nearest_neighbors", partial(nearest_neighbors, probes=4, list_rows=60))
    points, truth = planted(2500, 32, 10, 0.85, seed=0)
    config = ClusterConfig(min_cluster_size=40, min_samples=10, method="graph", neighbors=12)
    found, exact = cluster(points, config), package(points, config)
    both = (found.labels >= 0) & (exact.labels_ >= 0)
    assert adjusted_rand_score(found.labels[both], exact.labels_[both]) >= 0.95
    assert both.sum() >= 0.95 * max((found.labels >= 0).sum(), (exact.labels_ >= 0).sum())
    assert (found.labels[exact.labels_ < 0] < 0).mean() >= 0.9
    assert len(found.persistence) == 10 and adjusted_rand_score(truth[both], found.labels[both]) > 0.99
    assert found.details["recall_noise"] < found.details["recall"] < found.details["recall_clustered"] <= 1


def test_parts_of_a_graph_are_joined_where_they_are_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """All points ask, and every nearest neighbour is in the tree of the complete graph: nothing is approximate."""
    monkeypatch.setattr(density_tree, "_ASKING_PER_PART", 220)
    points, _ = planted(220, 6, 4, 0.97, seed=1)
    ones = np.ones(220, np.int64)
    sparse, parts = graph_linkage(points, nearest_neighbors(points, 1, seed=0), ones, 1)
    assert parts > 4
    whole, one = graph_linkage(points, nearest_neighbors(points, 219, seed=0), ones, 1)
    assert one == 1
    np.testing.assert_allclose(sparse.heights, whole.heights, rtol=1e-6)
    monkeypatch.setattr(density_tree, "_ASKING_PER_PART", 1)
    rough, _ = graph_linkage(points, nearest_neighbors(points, 1, seed=0), ones, 1)
    assert (rough.heights >= whole.heights - 1e-6).all() and rough.heights[-1] < 1.5 * whole.heights[-1]


def test_the_largest_cluster_is_the_first() -> None:
    points, _ = planted(600, 8, 5, 0.95, seed=2)
    for method in ("exact", "graph"):
        found = cluster(points, ClusterConfig(min_cluster_size=20, method=method))
        sizes = np.bincount(found.labels[found.labels >= 0])
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True) and len(sizes) == len(found.persistence)
        assert found.to_dict()["sizes"] == sizes.tolist()
        turned = cluster(points[::-1].copy(), ClusterConfig(min_cluster_size=20, method=method))
        assert np.bincount(turned.labels[turned.labels >= 0]).tolist() == sizes.tolist()


def test_ties_of_size_go_to_the_first_member() -> None:
    labels = np.array([-1, 2, 0, 1, 0, 1, 2, 1, 3])
    order, places = clustering._by_size(labels, 4)
    assert order.tolist() == [1, 2, 0, 3]
    assert places[labels].tolist() == [-1, 1, 2, 0, 2, 0, 1, 0, 3]


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_QUERIES", 200)
    points, _ = planted(1500, 16, 6, 0.8, seed=5)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(numba, "get_num_threads", lambda threads=threads: threads)
        results.append(cluster(points, ClusterConfig(min_cluster_size=30, method="graph", seed=7)))
    np.testing.assert_array_equal(results[0].labels, results[1].labels)
    np.testing.assert_array_equal(results[0].probabilities, results[1].probabilities)
    assert results[0].details == results[1].details


@pytest.mark.parametrize("method", ["exact", "graph"])
def test_rows_without_direction_are_noise(method: Any) -> None:
    points, _ = planted(400, 8, 3, 0.95, seed=0)
    config = ClusterConfig(min_cluster_size=20, method=method)
    expected = cluster(points, config)
    holes = np.insert(points, [0, 17, 17, 400], np.nan, axis=0)
    found = cluster(holes, config)
    empty = np.isnan(holes[:, 0])
    assert (found.labels[empty] == -1).all() and (found.probabilities[empty] == 0).all()
    np.testing.assert_array_equal(found.labels[~empty], expected.labels)
    assert found.details["without_direction"] == 4


@pytest.mark.parametrize("method", ["exact", "graph"])
@pytest.mark.parametrize("selection", ["eom", "leaf"])
def test_one_group_alone_is_no_cluster(method: Any, selection: Any) -> None:
    config = ClusterConfig(min_cluster_size=30, selection=selection, method=method)
    same = np.repeat(planted(1, 8, 1, 1, seed=0)[0], 100, axis=0)
    found = cluster(same, config)
    assert (found.labels == -1).all() and not found.probabilities.any() and found.persistence.shape == (0,)
    assert found.to_dict()["clusters"] == 0 and found.to_dict()["noise"] == 100
    group, _ = planted(50, 8, 1, 0.9, seed=1)
    assert (cluster(group, config).labels == -1).all(), "too few to split in two"


def test_automatic_is_exact_while_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    points, _ = planted(200, 8, 3, 0.95, seed=0)
    assert cluster(points, ClusterConfig(min_cluster_size=20)).method == "exact"
    monkeypatch.setattr(clustering, "EXACT_UP_TO", 199)
    assert cluster(points, ClusterConfig(min_cluster_size=20)).method == "graph"
    past = cluster(points, ClusterConfig(min_cluster_size=20, method="exact"))  # without a matrix of distances
    assert_like_the_package(past, package(points, ClusterConfig(min_cluster_size=20)))


def test_input_that_cannot_be_clustered() -> None:
    points, _ = planted(50, 4, 2, 0.9, seed=0)
    points[:30] = np.nan
    with pytest.raises(DataError, match=r"20 rows have a direction, but a cluster needs min_cluster_size = 21"):
        cluster(points, ClusterConfig(min_cluster_size=21))
    with pytest.raises(ConfigError, match=r"float32 \[N, r\], not float64"):
        cluster(points.astype(np.float64), ClusterConfig(min_cluster_size=5))
    with pytest.raises(ConfigError, match=r"row 30 has 2 \(20 such rows\)"):
        cluster(points * 2, ClusterConfig(min_cluster_size=5))
    points[40] = np.inf
    with pytest.raises(ConfigError, match="row 40 has inf"):
        cluster(points, ClusterConfig(min_cluster_size=5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_cluster_size": 1}, "min_cluster_size must be at least 2"),
        ({"min_samples": 0}, "min_samples must be at least 1"),
        ({"selection": "all"}, "'eom' or 'leaf'"),
        ({"method": "fast"}, "'auto', 'exact' or 'graph'"),
        ({"neighbors": 9}, "at least min_samples, 10"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_settings_out_of_range(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterConfig(**{"min_cluster_size": 10, **changed})


def test_the_exact_method_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hdbscan", None)
    points, _ = planted(100, 4, 2, 0.9, seed=0)
    with pytest.raises(MissingDependencyError, match="hdbscan"):
        cluster(points, ClusterConfig(min_cluster_size=20))
