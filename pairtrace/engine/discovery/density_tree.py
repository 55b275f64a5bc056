"""From a neighbour graph to flat clusters: the steps of HDBSCAN after the distances.

Letters: U points with weights, N rows, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairtrace.kernels.neighbors import Neighbors, nearest_foreign

# Directions less than this apart count as equal: cosine 0.99995. Rows that are equal have infinite density, and beside
# it no other member of their cluster would have any share.
SMALLEST_DISTANCE = 0.01
# Points that ask, in all and for each part, when the graph falls into parts.
_ASKING = 4096
_ASKING_PER_PART = 64


@dataclass(frozen=True, kw_only=True)
class Linkage:
    """A single linkage tree: node i < U is a point, node U + i the i-th merge.

    Attributes:
        children: int32 [U - 1, 2].
        heights: float64 [U - 1], ascending.
        sizes: int64 [U - 1], by weight.
        weights: int64 [U], rows that a point stands for.
        cores: float64 [U], core distances.
    """

    children: np.ndarray
    heights: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    cores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class FlatClusters:
    """Clusters chosen from the tree.

    Attributes:
        labels: int64 [U], -1 for noise, else 0 .. C - 1.
        probabilities: float64 [U].
        persistence: float64 [C].
    """

    labels: np.ndarray
    probabilities: np.ndarray
    persistence: np.ndarray


def graph_linkage(
    points: np.ndarray, neighbors: Neighbors, weights: np.ndarray, min_samples: int
) -> tuple[Linkage, int]:
    """Single linkage of the mutual reachability distance over a neighbour graph.

    The minimum spanning forest of the graph may leave parts apart. Then points spread over every part but the largest
    look for the row of another part at the least mutual reachability distance, among all rows, and the shortest of each
    part joins the graph, until one part is left. A way found between two parts is real, but may be longer than the
    shortest, since not every point asks: parts may come apart at a lower density than they should, which neither cuts
    a part nor mixes two.

    Args:
        points: float32 [U, r], unit rows, all different.
        neighbors: of all points.
        weights: int64 [U].
        min_samples: neighbours that make the core distance, without the row itself.

    Returns:
        The tree, and the number of parts that were joined.
    """
    from pairtrace.kernels import density_tree_numba as kernels

    count = len(points)
    cores = kernels.core_distances(neighbors.ids, neighbors.distances, weights, min_samples)
    left, right = np.empty(count - 1, np.int32), np.empty(count - 1, np.int32)
    heights = np.empty(count - 1, np.float32)
    edges = kernels.forest(neighbors.ids, neighbors.distances, cores, left, right, heights)
    left, right, heights = left[:edges], right[:edges], heights[:edges]
    while True:
        parts = kernels.components(count, left, right)
        asking = _asking(parts)
        if not len(asking):
            break
        found, distances = nearest_foreign(points, asking, parts, cores)
        # One edge for each part, as in Boruvka's algorithm: more would join parts before their shortest way is known.
        order = np.lexsort((found, asking, distances, parts[asking]))
        shortest = order[np.unique(parts[asking][order], return_index=True)[1]]
        ends = np.sort(np.stack([asking[shortest], found[shortest]]), axis=0).astype(np.int32)
        left, right = np.append(left, ends[0]), np.append(right, ends[1])
        heights = np.append(heights, distances[shortest])
    order = np.lexsort((right, left, heights))
    tree = kernels.single_linkage(count, left[order], right[order], heights[order].astype(np.float64), weights)
    linkage = Linkage(children=tree[0], heights=tree[1], sizes=tree[2], weights=weights, cores=cores.astype(np.float64))
    return linkage, count - edges


def flat_clusters(linkage: Linkage, min_cluster_size: int, *, leaves_only: bool) -> FlatClusters:
    """Condense the tree and choose clusters, as hdbscan does with a single cluster not allowed.

    Args:
        linkage: the tree.
        min_cluster_size: rows that make a cluster.
        leaves_only: take the finest clusters instead of the most persistent ones.
    """
    from pairtrace.kernels import density_tree_numba as kernels

    point_cluster, point_lambda, parents, stability, deaths = kernels.condense(
        linkage.children,
        np.maximum(linkage.heights, SMALLEST_DISTANCE),
        linkage.sizes,
        linkage.weights,
        np.maximum(linkage.cores, SMALLEST_DISTANCE),
        min_cluster_size,
    )
    chosen = kernels.select(parents, stability, leaves_only)
    clusters = np.unique(chosen[chosen >= 0])
    places = np.full(len(parents), -1)
    places[clusters] = np.arange(len(clusters))
    of_point = chosen[point_cluster]
    clustered = of_point >= 0
    labels = np.where(clustered, places[of_point], -1)
    largest = deaths[of_point]
    probabilities = np.where(clustered, np.minimum(point_lambda, largest) / np.where(clustered, largest, 1), 0)
    sizes = np.bincount(labels[clustered], weights=linkage.weights[clustered], minlength=len(clusters))
    return FlatClusters(
        labels=labels, probabilities=probabilities, persistence=stability[clusters] / (sizes * deaths.max())
    )


def _asking(parts: np.ndarray) -> np.ndarray:
    """Points of every part but the largest, spread evenly over each: int64, empty where there is one part."""
    names, inverse, sizes = np.unique(parts, return_inverse=True, return_counts=True)
    if len(names) == 1:
        return np.empty(0, np.int64)
    order = np.argsort(inverse, kind="stable")
    ends = np.cumsum(sizes)
    each = max(1, min(_ASKING_PER_PART, _ASKING // (len(names) - 1)))
    asked = []
    for part in np.flatnonzero(np.arange(len(names)) != np.argmax(sizes)):
        members = order[ends[part] - sizes[part] : ends[part]]
        asked.append(members[np.unique(np.linspace(0, len(members) - 1, min(each, len(members))).astype(np.int64))])
    return np.concatenate(asked)
