"""The CPU kernels behind `pairtrace.kernels.topk`: imported only when they run, because Numba is heavy.

Letters: n scores of a block, K directions, C capacity (entries a heap has room for).

Each direction has a binary heap of (key, row) whose root is the worst entry. A key is the score, or its negative where
the smallest are kept, so that larger keys are better; among equal keys the lower row is better.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import prange

from pairtrace.kernels.compiled import parallel, run

# Scores compared together: several cache lines of a row, or of whole rows where there are few directions.
GROUP = 64


@numba.njit
def _worse(key: Any, row: Any, other_key: Any, other_row: Any) -> Any:
    return key < other_key or (key == other_key and row > other_row)


@numba.njit
def _push(keys: Any, rows: Any, held: int, key: Any, row: Any) -> None:
    """Add an entry to a heap of `held` entries."""
    child = held
    while child > 0:
        parent = (child - 1) // 2
        if not _worse(key, row, keys[parent], rows[parent]):
            break
        keys[child], rows[child] = keys[parent], rows[parent]
        child = parent
    keys[child], rows[child] = key, row


@numba.njit
def _replace_worst(keys: Any, rows: Any, held: int, key: Any, row: Any) -> None:
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= held:
            break
        if child + 1 < held and _worse(keys[child + 1], rows[child + 1], keys[child], rows[child]):
            child += 1
        if not _worse(keys[child], rows[child], key, row):
            break
        keys[parent], rows[parent] = keys[child], rows[child]
        parent = child
    keys[parent], rows[parent] = key, row


@numba.njit
def _offer(keys: Any, rows: Any, held: int, k: int, key: Any, row: Any) -> int:
    """Offer an entry to a heap that may hold k; returns how many it holds then."""
    if held < k:
        _push(keys, rows, held, key, row)
        return held + 1
    if _worse(keys[0], rows[0], key, row):
        _replace_worst(keys, rows, held, key, row)
    return held


@numba.njit
def _hits(flat: Any, start: Any, count: Any, refused_below: Any, place: Any, sign: Any) -> Any:
    """Scores that are not refused at once. One comparison each, vectorised; NaN is never refused by it."""
    hits = np.int32(0)
    for i in range(count):
        if not (flat[start + i] * sign < refused_below[place + i]):
            hits += np.int32(1)
    return hits


@numba.njit
def _task(
    flat: Any,
    first: int,
    last: int,
    start_row: int,
    sign: Any,
    k: int,
    keys: Any,
    rows: Any,
    held: Any,
    thresholds: Any,
    nan_count: Any,
) -> None:
    """Offer the scores of directions [first, last), row by row: the scores are read in the order of the memory."""
    K = thresholds.shape[0]
    count = flat.shape[0] // K
    together = max(1, GROUP // K)
    refused_below = np.empty(together * (last - first), np.float32)
    for r in range(together):
        refused_below[r * (last - first) : (r + 1) * (last - first)] = thresholds[first:last]
    for i in range(0, count, together):
        looked_at = min(together, count - i)
        for group in range(first, last, GROUP):
            width = min(GROUP, last - group)
            start = i * K + group
            # Unsigned numbers: an index that may be negative keeps LLVM from vectorising.
            size = np.uint64(looked_at * width)
            if _hits(flat, np.uint64(start), size, refused_below, np.uint64(group - first), sign) == 0:
                continue
            for r in range(looked_at):
                for j in range(group, group + width):
                    key = flat[start + r * width + j - group] * sign
                    if key < thresholds[j]:
                        continue
                    if np.isnan(key):
                        nan_count[j] += 1
                        continue
                    held[j] = _offer(keys[j], rows[j], held[j], k, key, start_row + i + r)
                    if held[j] == k:
                        thresholds[j] = keys[j, 0]
            for r in range(together):
                place = r * (last - first) + group - first
                refused_below[place : place + width] = thresholds[group : group + width]


@parallel
def _update(
    flat: Any,
    task_width: int,
    start_row: int,
    sign: Any,
    k: int,
    keys: Any,
    rows: Any,
    held: Any,
    thresholds: Any,
    nan_count: Any,
) -> None:
    K = thresholds.shape[0]
    for task in prange(-(-K // task_width)):
        first = task * task_width
        last = min(first + task_width, K)
        _task(flat, first, last, start_row, sign, k, keys, rows, held, thresholds, nan_count)


@parallel
def _merge(
    k: int,
    keys: Any,
    rows: Any,
    held: Any,
    thresholds: Any,
    other_keys: Any,
    other_rows: Any,
    other_held: Any,
) -> None:
    for j in prange(keys.shape[0]):
        for entry in range(other_held[j]):
            held[j] = _offer(keys[j], rows[j], held[j], k, other_keys[j, entry], other_rows[j, entry])
        if held[j] == k:
            thresholds[j] = keys[j, 0]


def update(
    scores: np.ndarray,
    start_row: int,
    sign: np.float32,
    k: int,
    keys: np.ndarray,
    rows: np.ndarray,
    held: np.ndarray,
    thresholds: np.ndarray,
    nan_count: np.ndarray,
) -> None:
    """Offer a block of scores.

    Args:
        scores: float32 [n, K], contiguous, read-only.
        start_row: row of `scores[0]`.
        sign: 1 to keep the largest, -1 to keep the smallest.
        k: entries kept per direction.
        keys: float32 [K, C] heaps, C at least min(k, held + n).
        rows: int64 [K, C].
        held: int64 [K] entries of each heap.
        thresholds: float32 [K] worst key of each full heap, minus infinity for the others.
        nan_count: int64 [K].
    """
    groups = -(-len(thresholds) // GROUP)
    task_width = GROUP * -(-groups // numba.get_num_threads())
    run(_update, scores.reshape(-1), task_width, start_row, sign, k, keys, rows, held, thresholds, nan_count)


def merge(
    k: int,
    keys: np.ndarray,
    rows: np.ndarray,
    held: np.ndarray,
    thresholds: np.ndarray,
    other_keys: np.ndarray,
    other_rows: np.ndarray,
    other_held: np.ndarray,
) -> None:
    """Offer the entries of other heaps; the arrays are those of `update`."""
    run(_merge, k, keys, rows, held, thresholds, other_keys, other_rows, other_held)
