"""Groups of points that point the same way, and the noise between them (HDBSCAN, exact or on a neighbour graph).

Letters: N points, r width, C clusters.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pairtrace.engine.discovery.density_tree import FlatClusters, Linkage, flat_clusters, graph_linkage
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataError, MissingDependencyError
from pairtrace.kernels.neighbors import distinct_rows, nearest_neighbors, recall

logger = logging.getLogger(__name__)

# Up to this many points "auto" takes the exact method: seconds, and a matrix of distances of half a gigabyte.
EXACT_UP_TO = 5_000
# The least size of a cluster may be thousands of rows, and a graph holds at least `min_samples` neighbours of each row.
_MOST_SAMPLES = 16
# On two preference sets of 4,000 pairs 32 neighbours gave the clusters of the exact run (adjusted Rand index of 0.999
# over all pairs, with 5 and with 15 samples); with 15 neighbours it was 0.83 to 1.00.
_FEWEST_NEIGHBORS = 32
# Rows whose neighbours are looked up exactly, to tell how good the graph is.
_RECALL_ROWS = 1_000


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How to cluster.

    Attributes:
        min_cluster_size: rows that make a cluster, at least 2; fewer are noise.
        min_samples: the density at a row is read at its `min_samples`-th nearest other row; None takes
            `min_cluster_size`, but at most 16.
        selection: "eom" takes the most persistent clusters of the hierarchy, "leaf" the finest.
        method: "exact" is the hdbscan package, "graph" an approximate neighbour graph in its place; "auto" is exact up
            to `EXACT_UP_TO` rows.
        neighbors: neighbours per row in the graph, at least `min_samples`; None takes twice that, but at least 32.
        seed: of everything random; the same seed gives the same bits.

    Raises:
        ConfigError: a value is out of range.
    """

    min_cluster_size: int
    min_samples: int | None = None
    selection: Literal["eom", "leaf"] = "eom"
    method: Literal["auto", "exact", "graph"] = "auto"
    neighbors: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_cluster_size < 2:
            raise ConfigError(f"min_cluster_size must be at least 2, not {self.min_cluster_size}")
        if self.min_samples is not None and self.min_samples < 1:
            raise ConfigError(f"min_samples must be at least 1, not {self.min_samples}")
        if self.selection not in ("eom", "leaf"):
            raise ConfigError(f"selection must be 'eom' or 'leaf', not {self.selection!r}")
        if self.method not in ("auto", "exact", "graph"):
            raise ConfigError(f"method must be 'auto', 'exact' or 'graph', not {self.method!r}")
        if self.neighbors is not None and self.neighbors < self.samples:
            raise ConfigError(f"neighbors must be at least min_samples, {self.samples}, not {self.neighbors}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative: {self.seed}")

    @property
    def samples(self) -> int:
        """`min_samples` as used."""
        return min(self.min_cluster_size, _MOST_SAMPLES) if self.min_samples is None else self.min_samples


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """What `cluster` found.

    Attributes:
        labels: int32 [N], -1 for noise; clusters are numbered from 0 by size, the largest first, ties by first member.
        probabilities: float32 [N], how firmly a row belongs to its cluster, against its densest; 0 for noise.
        persistence: float32 [C], the share of the greatest possible stability that a cluster has.
        method: "exact" or "graph".
        details: settings as used; for "graph" also the lists of the search, how many of them a row looked into, the
            share of the true neighbours found (`recall`, for `recall_rows` rows drawn at random; also apart for those
            in clusters and in noise, None without any) and the parts of the graph that were joined.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    persistence: np.ndarray
    method: str
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What is worth a line in a report: everything but the rows."""
        sizes = np.bincount(self.labels[self.labels >= 0], minlength=len(self.persistence))
        return {
            "method": self.method,
            "rows": len(self.labels),
            "clusters": len(self.persistence),
            "sizes": sizes.tolist(),
            "persistence": [round(float(value), 6) for value in self.persistence],
            "noise": int((self.labels < 0).sum()),
            **self.details,
        }


def cluster(points: np.ndarray, config: ClusterConfig, progress: Progress = NULL_PROGRESS) -> Clustering:
    """Cluster unit rows by Euclidean distance, which orders them as the cosine does.

    A set that is one group as a whole has no cluster, since nothing stands out of it: all rows are noise then.

    Args:
        points: float32 [N, r], unit rows; a row with NaN has no direction and is noise.
        config: how.
        progress: receives the stages.

    Raises:
        ConfigError: `points` has another dtype or shape, or rows that are not of unit length.
        DataError: fewer rows with a direction than `min_cluster_size`.
        MissingDependencyError: the exact method without the package hdbscan.
    """
    rows = np.flatnonzero(_directed(points))
    if len(rows) < config.min_cluster_size:
        raise DataError(
            f"{len(rows)} rows have a direction, but a cluster needs min_cluster_size = {config.min_cluster_size}; "
            "give more rows or a lower min_cluster_size"
        )
    used = np.ascontiguousarray(points if len(rows) == len(points) else points[rows])
    exact = config.method == "exact" or (config.method == "auto" and len(used) <= EXACT_UP_TO)
    details: dict[str, Any] = {
        "min_cluster_size": config.min_cluster_size,
        "min_samples": config.samples,
        "selection": config.selection,
        "seed": config.seed,
        "without_direction": len(points) - len(rows),
    }
    flat, found = _exact(used, config, progress) if exact else _on_graph(used, config, progress)
    order, places = _by_size(flat.labels, len(flat.persistence))
    labels, probabilities = np.full(len(points), -1, np.int32), np.zeros(len(points), np.float32)
    labels[rows] = places[flat.labels]
    probabilities[rows] = flat.probabilities
    return Clustering(
        labels=labels,
        probabilities=probabilities,
        persistence=flat.persistence[order].astype(np.float32),
        method="exact" if exact else "graph",
        details=details | found,
    )


def _directed(points: np.ndarray) -> np.ndarray:
    """Which rows have a direction."""
    if points.ndim != 2 or points.dtype != np.float32:
        raise ConfigError(f"points must be float32 [N, r], not {points.dtype} {list(points.shape)}")
    squares = np.einsum("ij,ij->i", points, points)
    directed: np.ndarray = ~np.isnan(squares)
    off = np.flatnonzero(directed & ~(np.abs(squares - 1) < 1e-3))
    if len(off):
        raise ConfigError(
            f"points must have unit length, but row {off[0]} has {np.sqrt(squares[off[0]]):.4g} ({len(off)} such rows)"
        )
    return directed


def _exact(points: np.ndarray, config: ClusterConfig, progress: Progress) -> tuple[FlatClusters, dict[str, Any]]:
    """The hierarchy of the hdbscan package; clusters are chosen from it as from that of a graph."""
    try:
        import hdbscan
    except ImportError as error:
        raise MissingDependencyError("hdbscan", "discover", "exact clustering") from error
    from pairtrace.kernels.shared_work import one_blas_thread

    progress.start("hierarchy", None, "rows")
    few = len(points) <= EXACT_UP_TO
    with one_blas_thread():  # the same bits whatever the number of threads
        fitted = hdbscan.HDBSCAN(
            min_cluster_size=config.min_cluster_size,
            min_samples=config.samples,
            # Both are exact. A matrix of distances is many times faster while it fits.
            algorithm="generic" if few else "prims_kdtree",
            metric="euclidean",
        ).fit(points.astype(np.float64))
    tree = fitted.single_linkage_tree_.to_numpy()
    linkage = Linkage(
        children=tree[:, :2].astype(np.int32),
        heights=np.ascontiguousarray(tree[:, 2]),
        sizes=tree[:, 3].astype(np.int64),
        weights=np.ones(len(points), np.int64),
        cores=np.zeros(len(points)),
    )
    progress.finish()
    return flat_clusters(linkage, config.min_cluster_size, leaves_only=config.selection == "leaf"), {}


def _on_graph(points: np.ndarray, config: ClusterConfig, progress: Progress) -> tuple[FlatClusters, dict[str, Any]]:
    """Equal rows become one point with a weight: thousands of them would have no neighbours but each other."""
    first, inverse = distinct_rows(points)
    details: dict[str, Any] = {"distinct": len(first)}
    if len(first) == 1:
        none = np.full(len(points), -1)
        return FlatClusters(labels=none, probabilities=np.zeros(len(points)), persistence=np.zeros(0)), details
    if len(first) < len(points):
        points = points[first]
    neighbors = config.neighbors or max(2 * config.samples, _FEWEST_NEIGHBORS)
    progress.start("neighbours", len(points), "rows")
    graph = nearest_neighbors(points, min(neighbors, len(points) - 1), seed=config.seed, advance=progress.advance)
    progress.finish()
    progress.start("hierarchy", None, "rows")
    linkage, parts = graph_linkage(points, graph, np.bincount(inverse), config.samples)
    flat = flat_clusters(linkage, config.min_cluster_size, leaves_only=config.selection == "leaf")
    rng = np.random.default_rng(config.seed)
    looked_at = np.sort(rng.choice(len(points), min(len(points), _RECALL_ROWS), replace=False))
    shares, clustered = recall(graph, points, looked_at), flat.labels[looked_at] >= 0
    progress.finish()
    details |= {
        "neighbors": graph.ids.shape[1],
        "lists": graph.lists,
        "probes": graph.probes,
        "parts": parts,
        "recall": _mean(shares),
        "recall_clustered": _mean(shares[clustered]),
        "recall_noise": _mean(shares[~clustered]),
        "recall_rows": len(looked_at),
    }
    logger.debug("neighbour graph: %s", details)
    expanded = FlatClusters(
        labels=flat.labels[inverse], probabilities=flat.probabilities[inverse], persistence=flat.persistence
    )
    return expanded, details


def _by_size(labels: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The clusters, largest first, ties by first member; and the place of each in that order, the last is noise's."""
    sizes = np.bincount(labels[labels >= 0], minlength=clusters)
    names, firsts = np.unique(labels, return_index=True)
    order = np.lexsort((firsts[names >= 0], -sizes))
    places = np.full(clusters + 1, -1)
    places[order] = np.arange(clusters)
    return order, places


def _mean(shares: np.ndarray) -> float | None:
    return round(float(shares.mean()), 4) if len(shares) else None
