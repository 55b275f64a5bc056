"""The nearest neighbours of unit rows, among millions of them: inverted lists, matrix products and a streaming top-k.

Rows are put into lists around the centres of a spherical k-means (Dhillon and Modha 2001), fitted to a sample. A query
is compared with the rows of the lists whose centres are nearest to it, list by list, as a float32 matrix product; the
distances of the k best are computed anew, exactly. Up to `PROBES` lists every list is looked at, and the answer is
exact; beyond that `recall` says how good it is. The number of threads changes no bit.

Letters: N rows, r width, k neighbours, L lists, n queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pairtrace.errors import ConfigError

# Lists that a query looks into, and rows of a list on average. Of a million planted rows (r = 50, k = 32), members of
# clusters found 99 % of their neighbours in 32 lists and all in 64; rows that point anywhere found 54 % and 66 %, and
# their 10th neighbour 1 % too far away.
PROBES = 64
LIST_ROWS = 512
# Longer lists are cut: crowded places must not make the products quadratic.
_LONGEST_LIST = 4 * LIST_ROWS
# Queries and candidates of a product. Where there are many lists, few of so many queries ask any one of them, and small
# products are slow: so many queries are answered together that `_ASKED` ask a list on average.
_QUERIES = 1024
_ASKED = 256
_CANDIDATES = 4096
_SAMPLE_PER_LIST = 64
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Neighbours by Euclidean distance, nearest first, ties by the lower row; a row is not its own neighbour.

    Attributes:
        ids: int32 [N, k], -1 where fewer were found.
        distances: float32 [N, k], infinite where fewer were found.
        lists: L.
        probes: lists that a query looked into.
    """

    ids: np.ndarray
    distances: np.ndarray
    lists: int
    probes: int


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """Rows in the order of their lists.

    Attributes:
        rows: float32 [N, r].
        names: int64 [N], the number of each row before.
        starts: int64 [L + 1].
        centers: float32 [L, r].
    """

    rows: np.ndarray
    names: np.ndarray
    starts: np.ndarray
    centers: np.ndarray


def nearest_neighbors(
    points: np.ndarray,
    k: int,
    *,
    seed: int,
    probes: int = PROBES,
    list_rows: int = LIST_ROWS,
    advance: Callable[[int], None] = lambda rows: None,
) -> Neighbors:
    """The k nearest other rows of every row.

    Args:
        points: float32 [N, r], unit rows, contiguous.
        k: neighbours per row.
        seed: of the sample that the lists are made from.
        probes: lists that a query looks into.
        list_rows: rows of a list on average.
        advance: told how many more rows are answered, by any thread.

    Raises:
        ConfigError: k is not between 1 and N - 1.
    """
    from pairtrace.kernels import neighbors_numba
    from pairtrace.kernels.shared_work import share

    N = len(points)
    if not 1 <= k < N:
        raise ConfigError(f"k must be from 1 to {N - 1}, one less than there are rows, not {k}")
    lists = _in_lists(points, max(1, -(-N // list_rows)), seed)
    probes = min(probes, len(lists.centers))
    ids, distances = np.empty((N, k), np.int32), np.empty((N, k), np.float32)
    list_of = np.repeat(np.arange(len(lists.centers)), np.diff(lists.starts))
    together = _QUERIES * max(1, _ASKED * len(lists.centers) // (probes * _QUERIES))

    def answer(starts: Iterator[int]) -> None:
        buffer = np.empty(_QUERIES * max(int(np.diff(lists.starts).max()), len(lists.centers)), np.float32)
        for start in starts:
            own = np.arange(start, min(start + together, N))
            queries = lists.rows[own]
            nearest = np.empty((len(own), probes), np.int32)
            for begin in range(0, len(own), _QUERIES):
                part = slice(begin, begin + _QUERIES)
                nearest[part] = _nearest_lists(queries[part], lists.centers, probes, list_of[own[part]], buffer)
            keys, rows = np.empty((len(own), k), np.float32), np.empty((len(own), k), np.int32)
            held = np.zeros(len(own), np.int64)
            asked = np.argsort(nearest, axis=None, kind="stable")
            bounds = np.searchsorted(nearest.ravel()[asked], np.arange(len(lists.centers) + 1))
            for number in np.flatnonzero(np.diff(bounds)):
                first, last = lists.starts[number], lists.starts[number + 1]
                for begin in range(bounds[number], bounds[number + 1], _QUERIES):
                    places = asked[begin : min(begin + _QUERIES, bounds[number + 1])] // probes
                    scores = _product(queries[places], lists.rows[first:last], buffer)
                    neighbors_numba.offer(scores, places, first, own, keys, rows, held)
            neighbors_numba.finish(lists.rows, queries, rows, held, lists.names, lists.names[own], ids, distances)
            advance(len(own))

    share(answer, range(0, N, together))
    return Neighbors(ids=ids, distances=distances, lists=len(lists.centers), probes=probes)


def exact_neighbors(points: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of some rows, by looking at every row.

    Args:
        points: float32 [N, r], unit rows, contiguous.
        queries: int64 [n], rows to answer.
        k: neighbours per row, below N.

    Returns:
        ids int32 [n, k] and distances float32 [n, k], as in `Neighbors`.
    """
    from pairtrace.kernels import neighbors_numba
    from pairtrace.kernels.shared_work import share

    assert 1 <= k < len(points)
    ids, distances = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), np.float32)
    names = np.arange(len(points))

    def answer(starts: Iterator[int]) -> None:
        buffer = np.empty(_QUERIES * _CANDIDATES, np.float32)
        for start in starts:
            own = np.asarray(queries[start : start + _QUERIES], np.int64)
            block = points[own]
            keys, rows = np.empty((len(own), k), np.float32), np.empty((len(own), k), np.int32)
            held, places = np.zeros(len(own), np.int64), np.arange(len(own))
            for first in range(0, len(points), _CANDIDATES):
                scores = _product(block, points[first : first + _CANDIDATES], buffer)
                neighbors_numba.offer(scores, places, first, own, keys, rows, held)
            neighbors_numba.finish(points, block, rows, held, names, start + places, ids, distances)

    share(answer, range(0, len(queries), _QUERIES))
    return ids, distances


def recall(neighbors: Neighbors, points: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Share of the true k nearest that was found, for some rows: float64 [n].

    What is as near as the true k-th counts as found, so that ties take nothing away.

    Args:
        neighbors: of all rows of `points`.
        points: float32 [N, r], as given to `nearest_neighbors`.
        queries: int64 [n], rows to look at.
    """
    k = neighbors.distances.shape[1]
    _, distances = exact_neighbors(points, queries, k)
    share: np.ndarray = np.mean(neighbors.distances[queries] <= distances[:, -1:], axis=1)
    return share


def nearest_foreign(
    points: np.ndarray, queries: np.ndarray, groups: np.ndarray, cores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The row of another group at the least mutual reachability distance, for some rows, by looking at every row.

    Args:
        points: float32 [N, r], unit rows, contiguous.
        queries: int64 [n], rows to answer.
        groups: int32 [N], at least two different ones.
        cores: float32 [N] core distances.

    Returns:
        rows int64 [n] and mutual reachability distances float32 [n].
    """
    from pairtrace.kernels import neighbors_numba
    from pairtrace.kernels.shared_work import share

    found = np.empty(len(queries), np.int64)

    def answer(starts: Iterator[int]) -> None:
        buffer = np.empty(_QUERIES * _CANDIDATES, np.float32)
        for start in starts:
            own = queries[start : start + _QUERIES]
            block, best = points[own], np.full(len(own), np.inf)
            rows = np.full(len(own), -1, np.int64)
            for first in range(0, len(points), _CANDIDATES):
                scores = _product(block, points[first : first + _CANDIDATES], buffer)
                neighbors_numba.offer_foreign(scores, first, groups, cores, groups[own], cores[own], best, rows)
            found[start : start + _QUERIES] = rows

    share(answer, range(0, len(queries), _QUERIES))
    assert (found >= 0).all(), "there is another group"
    distances = neighbors_numba.pair_distances(points, np.asarray(queries, np.int64), found)
    return found, np.maximum(distances, np.maximum(cores[queries], cores[found]))


def distinct_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows differ in some bit.

    Args:
        points: float32 [N, r], contiguous.

    Returns:
        first int64 [U], the first of each set of equal rows, ascending; and inverse int32 [N], its place in `first` for
        every row. (Different rows of one 64-bit hash could keep equal ones apart, which does no harm.)
    """
    from pairtrace.kernels import neighbors_numba

    order = np.argsort(neighbors_numba.row_hashes(points.view(np.uint32)), kind="stable")
    starts = np.ones(len(points), bool)
    for begin in range(1, len(points), _CANDIDATES):
        rows = order[begin - 1 : begin + _CANDIDATES]
        block = points[rows].view(np.uint32)
        starts[begin : begin + len(rows) - 1] = (block[1:] != block[:-1]).any(axis=1)
    # The sort is stable: the first of a run is its lowest row.
    leaders = order[starts]
    by_row = np.argsort(leaders, kind="stable")
    place = np.empty(len(leaders), np.int32)
    place[by_row] = np.arange(len(leaders), dtype=np.int32)
    inverse = np.empty(len(points), np.int32)
    inverse[order] = place[np.cumsum(starts) - 1]
    return leaders[by_row], inverse


def _product(queries: np.ndarray, rows: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """Cosines float32 [n, c] of unit rows, in the buffer."""
    scores = buffer[: len(queries) * len(rows)].reshape(len(queries), len(rows))
    return np.matmul(queries, rows.T, out=scores)


def _nearest_lists(
    queries: np.ndarray, centers: np.ndarray, probes: int, own: np.ndarray, buffer: np.ndarray
) -> np.ndarray:
    """The lists a query looks into: int32 [n, probes], the nearest by their centres and always its own."""
    from pairtrace.kernels import neighbors_numba

    keys, found = np.empty((len(queries), probes), np.float32), np.empty((len(queries), probes), np.int32)
    none, held = np.full(len(queries), -1), np.zeros(len(queries), np.int64)
    scores = _product(queries, centers, buffer)
    neighbors_numba.offer(scores, np.arange(len(queries)), 0, none, keys, found, held)
    # Parts of a long list have one centre: the nearest may be other parts than the query's own.
    absent = ~(found == own[:, None]).any(axis=1)
    found[absent, -1] = own[absent]
    return found


def _in_lists(points: np.ndarray, lists: int, seed: int) -> _Lists:
    if lists == 1:
        centers, nearest = points[:1], np.zeros(len(points), np.int64)
    else:
        centers = _centers(points, lists, seed)
        nearest = _assign(points, centers)
    names = np.argsort(nearest, kind="stable")
    sizes = np.bincount(nearest, minlength=len(centers))
    parts = -(-sizes // _LONGEST_LIST)
    starts = [np.zeros(1, np.int64)]
    for size, count, end in zip(sizes, parts, np.cumsum(sizes), strict=True):
        starts.append(end - size + size * np.arange(1, count + 1) // max(count, 1))
    return _Lists(
        rows=points[names],
        names=names,
        starts=np.concatenate(starts),
        centers=np.ascontiguousarray(np.repeat(centers, parts, axis=0)),
    )


def _centers(points: np.ndarray, lists: int, seed: int) -> np.ndarray:
    """Unit centres float32 [L, r] by spherical k-means on a sample; one that attracts nothing stays where it was."""
    from pairtrace.kernels import neighbors_numba

    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(points), min(len(points), _SAMPLE_PER_LIST * lists), replace=False, shuffle=False)
    sample = points[np.sort(chosen)]
    centers = sample[np.sort(rng.choice(len(sample), lists, replace=False, shuffle=False))]
    for _ in range(_ROUNDS):
        sums, counts = np.zeros(centers.shape, np.float64), np.zeros(lists, np.int64)
        neighbors_numba.add_to_lists(sample, _assign(sample, centers), sums, counts)
        norms = np.linalg.norm(sums, axis=1)
        moved = norms > 0
        centers[moved] = sums[moved] / norms[moved, None]
    return centers


def _assign(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The list with the nearest centre: int64 [N]; ties go to the first."""
    from pairtrace.kernels.shared_work import share

    nearest = np.empty(len(points), np.int64)

    def work(starts: Iterator[int]) -> None:
        buffer = np.empty(_QUERIES * len(centers), np.float32)
        for start in starts:
            scores = _product(points[start : start + _QUERIES], centers, buffer)
            np.argmax(scores, axis=1, out=nearest[start : start + _QUERIES])

    share(work, range(0, len(points), _QUERIES))
    return nearest
