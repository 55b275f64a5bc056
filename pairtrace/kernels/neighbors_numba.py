"""The CPU kernels behind `pairtrace.kernels.neighbors`: imported only when they run, because Numba is heavy.

Letters: n queries of a block, c candidates of a block, k neighbours kept, N rows, r width, L lists.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from pairtrace.kernels.compiled import single_threaded

# Scores compared together with the worst that is held: a few cache lines.
_GROUP = 64


@numba.njit
def _hits(flat: Any, start: Any, count: Any, threshold: Any) -> Any:
    """Scores that reach a threshold. One comparison each, vectorised."""
    hits = np.int32(0)
    for i in range(count):
        if flat[start + i] >= threshold:
            hits += np.int32(1)
    return hits


@numba.njit
def _insert(keys: Any, rows: Any, held: Any, key: Any, row: Any) -> Any:
    """Put an entry into a list sorted best first, ties by the lower row; returns how many it holds then."""
    k = keys.shape[0]
    if held == k and (key < keys[k - 1] or (key == keys[k - 1] and row > rows[k - 1])):
        return held
    place = min(held, k - 1)
    while place > 0 and (keys[place - 1] < key or (keys[place - 1] == key and rows[place - 1] > row)):
        keys[place], rows[place] = keys[place - 1], rows[place - 1]
        place -= 1
    keys[place], rows[place] = key, row
    return min(held + 1, k)


@single_threaded
def offer(scores: Any, places: Any, first: int, own: Any, keys: Any, rows: Any, held: Any) -> None:
    """Offer the scores of candidates `first`, `first + 1`, ... to queries.

    Args:
        scores: float32 [n, c], contiguous, no NaN.
        places: int64 [n], the place of each query among those that are being answered.
        first: row of the first candidate.
        own: int64 [queries], row of each query, which is not its own neighbour; -1 for none.
        keys: float32 [queries, k], sorted best first.
        rows: int32 [queries, k].
        held: int64 [queries].
    """
    flat = scores.reshape(-1)
    n, c = scores.shape
    k = keys.shape[1]
    for i in range(n):
        query = places[i]
        count = held[query]
        threshold = keys[query, k - 1] if count == k else np.float32(-np.inf)
        for group in range(0, c, _GROUP):
            size = min(_GROUP, c - group)
            # Unsigned numbers: an index that may be negative keeps LLVM from vectorising.
            if _hits(flat, np.uint64(i * c + group), np.uint64(size), threshold) == 0:
                continue
            for j in range(group, group + size):
                key = flat[i * c + j]
                if key < threshold or first + j == own[query]:
                    continue
                count = _insert(keys[query], rows[query], count, key, np.int32(first + j))
                if count == k:
                    threshold = keys[query, k - 1]
        held[query] = count


@numba.njit
def _distance(left: Any, right: Any) -> Any:
    """Euclidean distance, from the differences: exactly 0 for equal rows and the same in both directions."""
    total = 0.0
    for i in range(left.shape[0]):
        difference = np.float64(left[i]) - np.float64(right[i])
        total += difference * difference
    return np.sqrt(total)


@single_threaded
def finish(points: Any, queries: Any, rows: Any, held: Any, names: Any, targets: Any, ids: Any, distances: Any) -> None:
    """Write the neighbours of queries by their distance, nearest first, ties by the lower name.

    Args:
        points: float32 [N, r].
        queries: float32 [n, r].
        rows: int32 [n, k] neighbours in `points`.
        held: int64 [n].
        names: int64 [N], what each row of `points` is called.
        targets: int64 [n], rows of the results to write.
        ids: int32 [N, k], overwritten there; -1 where there is no neighbour.
        distances: float32 [N, k], overwritten there; infinite where there is none.
    """
    for query in range(queries.shape[0]):
        out = targets[query]
        ids[out] = -1
        distances[out] = np.inf
        for entry in range(held[query]):
            row = rows[query, entry]
            distance = np.float32(_distance(queries[query], points[row]))
            name = np.int32(names[row])
            place = entry
            while place > 0 and (
                distances[out, place - 1] > distance
                or (distances[out, place - 1] == distance and ids[out, place - 1] > name)
            ):
                distances[out, place], ids[out, place] = distances[out, place - 1], ids[out, place - 1]
                place -= 1
            distances[out, place], ids[out, place] = distance, name


@single_threaded
def offer_foreign(
    scores: Any, first: int, groups: Any, cores: Any, own_groups: Any, own_cores: Any, best: Any, best_rows: Any
) -> None:
    """Offer candidates to queries that want the one of another group at the least mutual reachability distance.

    Args:
        scores: float32 [n, c] cosines of unit rows.
        first: row of the first candidate.
        groups: int32 [N].
        cores: float32 [N] core distances.
        own_groups: int32 [n] of the queries.
        own_cores: float32 [n].
        best: float64 [n], the least squared distance so far, infinite at the start.
        best_rows: int64 [n].
    """
    for i in range(scores.shape[0]):
        floor = np.float64(own_cores[i]) ** 2
        for j in range(scores.shape[1]):
            row = first + j
            if groups[row] == own_groups[i]:
                continue
            squared = max(2.0 - 2.0 * scores[i, j], floor, np.float64(cores[row]) ** 2)
            if squared < best[i]:
                best[i], best_rows[i] = squared, row


@single_threaded
def pair_distances(points: Any, left: Any, right: Any) -> Any:
    """Euclidean distances float32 [n] of rows `left` and `right`, int64 [n], of `points`, float32 [N, r]."""
    out = np.empty(left.shape[0], np.float32)
    for i in range(left.shape[0]):
        out[i] = _distance(points[left[i]], points[right[i]])
    return out


@single_threaded
def add_to_lists(rows: Any, lists: Any, sums: Any, counts: Any) -> None:
    """Sums float64 [L, r] and numbers int64 [L] of rows, float32 [n, r], by list, int64 [n]; added in row order."""
    for i in range(rows.shape[0]):
        counts[lists[i]] += 1
        for j in range(rows.shape[1]):
            sums[lists[i], j] += rows[i, j]


@single_threaded
def row_hashes(words: Any) -> Any:
    """A 64-bit hash of every row, from uint32 [N, r]: FNV-1a over words, with splitmix64's finaliser."""
    out = np.empty(words.shape[0], np.uint64)
    for i in range(words.shape[0]):
        value = np.uint64(0xCBF29CE484222325)
        for j in range(words.shape[1]):
            value = (value ^ np.uint64(words[i, j])) * np.uint64(0x100000001B3)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = value ^ (value >> np.uint64(31))
    return out
