"""The trees of HDBSCAN on a neighbour graph, in time linear in its edges: imported only when they run.

Campello, Moulavi and Sander 2013; the names are those of McInnes and Healy 2017 (arXiv 1705.07321). Points have
weights, so that equal rows can be one point: w copies of a point come apart at its own core distance.

Letters: U points, k neighbours, C clusters of the condensed tree (0 is the root).
Nodes of a single linkage tree: 0 .. U - 1 are points, U + i is the i-th merge.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from pairtrace.kernels.compiled import single_threaded


@single_threaded
def core_distances(ids: Any, distances: Any, weights: Any, min_samples: int) -> Any:
    """Distance float32 [U] to the `min_samples`-th nearest other row; of what is there where there are fewer.

    Args:
        ids: int32 [U, k], -1 where there is no neighbour.
        distances: float32 [U, k].
        weights: int64 [U].
        min_samples: as hdbscan counts, without the row itself.
    """
    cores = np.zeros(ids.shape[0], np.float32)
    for i in range(ids.shape[0]):
        counted = weights[i] - 1
        for j in range(ids.shape[1]):
            if counted >= min_samples or ids[i, j] < 0:
                break
            counted += weights[ids[i, j]]
            cores[i] = distances[i, j]
    return cores


@numba.njit
def _root(parents: Any, node: Any) -> Any:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@numba.njit
def _lower(weight: Any, low: Any, high: Any, other_weight: Any, other_low: Any, other_high: Any) -> Any:
    """Whether an edge comes before another. No two compare equal, so that there is one minimum spanning forest."""
    if weight != other_weight:
        return weight < other_weight
    return low < other_low or (low == other_low and high < other_high)


@numba.njit
def _skip(row: Any, start: int, groups: Any, group: int) -> int:
    """The first neighbour from `start` on that is of another group; k where there is none."""
    k = row.shape[0]
    j = start
    while j < k and row[j] >= 0 and groups[row[j]] == group:
        j += 1
    return k if j < k and row[j] < 0 else j


@numba.njit
def _offer_edges(
    i: int, start: int, row: Any, distances: Any, cores: Any, groups: Any, best: Any, best_low: Any, best_high: Any
) -> None:
    """Offer the edges of point i to the groups at both ends."""
    for j in range(start, row.shape[0]):
        other = row[j]
        if other < 0:
            break
        if groups[other] == groups[i]:
            continue
        height = max(distances[j], cores[i], cores[other])
        low, high = min(i, other), max(i, other)
        for group in (groups[i], groups[other]):
            if _lower(height, low, high, best[group], best_low[group], best_high[group]):
                best[group], best_low[group], best_high[group] = height, low, high


@single_threaded
def forest(ids: Any, distances: Any, cores: Any, left: Any, right: Any, heights: Any) -> int:
    """Minimum spanning forest of the mutual reachability distance over a neighbour graph (Boruvka).

    Args:
        ids: int32 [U, k], -1 where there is no neighbour.
        distances: float32 [U, k].
        cores: float32 [U].
        left: int32 [U - 1], overwritten with the edges' lower ends.
        right: int32 [U - 1], with their higher ends.
        heights: float32 [U - 1], with their lengths.

    Returns:
        The number of edges.
    """
    U, k = ids.shape
    parents = np.arange(U).astype(np.int32)
    groups = parents.copy()
    waiting, first = parents.copy(), np.zeros(U, np.int32)
    best = np.empty(U, np.float32)
    best_low, best_high = np.empty(U, np.int32), np.empty(U, np.int32)
    count, edges = U, 0
    while True:
        best[:] = np.inf
        still = 0
        for w in range(count):
            i = waiting[w]
            first[i] = _skip(ids[i], first[i], groups, groups[i])
            if first[i] < k:  # else all its neighbours are in its group, for good
                waiting[still] = i
                still += 1
                _offer_edges(i, first[i], ids[i], distances[i], cores, groups, best, best_low, best_high)
        if still == 0:
            return edges
        count = still
        for group in range(U):
            if best[group] == np.inf:
                continue
            a, b = _root(parents, best_low[group]), _root(parents, best_high[group])
            if a != b:
                parents[max(a, b)] = min(a, b)
                left[edges], right[edges], heights[edges] = best_low[group], best_high[group], best[group]
                edges += 1
        for i in range(U):
            groups[i] = _root(parents, np.int32(i))


@single_threaded
def components(U: int, left: Any, right: Any) -> Any:
    """The connected component of every point, int32 [U], named by its lowest point."""
    groups = np.arange(U).astype(np.int32)
    for edge in range(left.shape[0]):
        a, b = _root(groups, left[edge]), _root(groups, right[edge])
        groups[max(a, b)] = min(a, b)
    for i in range(U):
        groups[i] = groups[groups[i]]
    return groups


@single_threaded
def single_linkage(U: int, left: Any, right: Any, heights: Any, weights: Any) -> Any:
    """Merge points along edges; one that closes a circle is passed over.

    Args:
        U: points.
        left: int32 [edges] ends, ordered by length.
        right: int32 [edges].
        heights: float64 [edges], ascending; the edges connect all points.
        weights: int64 [U].

    Returns:
        children int32 [U - 1, 2] nodes, heights float64 [U - 1] and sizes int64 [U - 1] by weight.
    """
    parents = np.arange(2 * U - 1).astype(np.int32)
    children = np.empty((U - 1, 2), np.int32)
    merged = np.empty(U - 1, np.float64)
    sizes = np.empty(U - 1, np.int64)
    count = 0
    for edge in range(left.shape[0]):
        a, b = _root(parents, left[edge]), _root(parents, right[edge])
        if a == b:
            continue
        children[count, 0], children[count, 1] = a, b
        merged[count] = heights[edge]
        sizes[count] = (weights[a] if a < U else sizes[a - U]) + (weights[b] if b < U else sizes[b - U])
        parents[a] = parents[b] = U + count
        count += 1
    assert count == U - 1
    return children, merged, sizes


@single_threaded
def condense(children: Any, heights: Any, sizes: Any, weights: Any, apart: Any, min_cluster_size: int) -> Any:
    """Condense a single linkage tree: only what splits into two parts of `min_cluster_size` makes clusters.

    Args:
        children: int32 [U - 1, 2], of `single_linkage`.
        heights: float64 [U - 1], above 0.
        sizes: int64 [U - 1].
        weights: int64 [U].
        apart: float64 [U], above 0: where the copies of a point come apart.
        min_cluster_size: by weight.

    Returns:
        point_cluster int32 [U] and point_lambda float64 [U]: which cluster a point fell out of, and at which inverse
        distance; parents int32 [C], stability float64 [C], deaths float64 [C] (the largest lambda of a cluster's own).
    """
    U = weights.shape[0]
    nodes = 2 * U - 1
    # Every split adds two clusters, and clusters without children are disjoint and large enough.
    room = max(1, 2 * (weights.sum() // min_cluster_size))
    parents = np.full(room, -1, np.int32)
    births, stability, deaths = np.zeros(room), np.zeros(room), np.zeros(room)
    clusters = 1
    cluster, gone = np.zeros(nodes, np.int32), np.zeros(nodes)  # gone: the lambda at which a node left its cluster
    for node in range(nodes - 1, U - 1, -1):  # from the root down: a merge comes after its parts
        own, left, right = cluster[node], children[node - U, 0], children[node - U, 1]
        if gone[node] > 0:
            cluster[left] = cluster[right] = own
            gone[left] = gone[right] = gone[node]
            continue
        leaving = 1.0 / heights[node - U]
        left_size = weights[left] if left < U else sizes[left - U]
        right_size = weights[right] if right < U else sizes[right - U]
        splits = left_size >= min_cluster_size and right_size >= min_cluster_size
        for child, size in ((left, left_size), (right, right_size)):
            cluster[child] = own
            if splits:
                cluster[child] = clusters
                parents[clusters], births[clusters] = own, leaving
                clusters += 1
            elif size >= min_cluster_size:
                continue  # the cluster goes on
            else:
                gone[child] = leaving
            stability[own] += (leaving - births[own]) * size
            deaths[own] = max(deaths[own], leaving)
    for point in range(U):
        if gone[point] == 0:  # large enough by its copies alone
            own = cluster[point]
            gone[point] = 1.0 / apart[point]
            stability[own] += (gone[point] - births[own]) * weights[point]
            deaths[own] = max(deaths[own], gone[point])
    return cluster[:U].copy(), gone[:U].copy(), parents[:clusters], stability[:clusters], deaths[:clusters]


@single_threaded
def select(parents: Any, stability: Any, leaves_only: bool) -> Any:
    """Choose flat clusters: int32 [C], for every cluster the chosen one that it is part of, or -1.

    The root is never chosen: a whole has nothing to stand out from. Excess of mass takes a cluster unless its chosen
    descendants are more stable together; otherwise the clusters without children are taken.
    """
    C = parents.shape[0]
    below, has_children = np.zeros(C), np.zeros(C, np.bool_)
    chosen = np.full(C, -1, np.int32)
    wanted = np.zeros(C, np.bool_)
    for c in range(C - 1, 0, -1):
        wanted[c] = not has_children[c] if leaves_only else below[c] <= stability[c]
        below[parents[c]] += stability[c] if wanted[c] else below[c]
        has_children[parents[c]] = True
    for c in range(1, C):
        if chosen[parents[c]] >= 0:
            chosen[c] = chosen[parents[c]]
        elif wanted[c]:
            chosen[c] = c
    return chosen
