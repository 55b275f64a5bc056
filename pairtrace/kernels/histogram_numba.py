"""The CPU kernel behind `pairtrace.kernels.histogram`: imported only when it runs, because Numba is heavy.

Letters: n scores of a block, K directions, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from pairtrace.kernels.compiled import parallel, run

# Directions of one task: a cache line of a row of scores; their counters stay in a thread's cache.
TASK_DIRECTIONS = 16


@parallel
def _update(scores: Any, edges: Any, outside: float, counts: Any, nan_count: Any, far_count: Any) -> None:
    rows, K = scores.shape
    bins = edges.shape[0] - 1
    for task in prange(-(-K // TASK_DIRECTIONS)):
        first = task * TASK_DIRECTIONS
        last = min(first + TASK_DIRECTIONS, K)
        for i in range(rows):
            for j in range(first, last):
                score = np.float64(scores[i, j])
                if np.isnan(score):
                    nan_count[j] += 1
                    continue
                if not abs(score) <= outside:
                    far_count[j] += 1
                    continue
                place = min(max(int((score + 1.0) * (0.5 * bins)), 0), bins - 1)
                # The sum was rounded: the edges decide.
                while place > 0 and score < edges[place]:
                    place -= 1
                while place < bins - 1 and score >= edges[place + 1]:
                    place += 1
                counts[j, place] += 1


def update(scores: np.ndarray, edges: np.ndarray, outside: float, counts: np.ndarray, nan_count: np.ndarray) -> int:
    """Count a block of scores.

    Args:
        scores: float32 [n, K], contiguous, read-only.
        edges: float64 [B + 1], evenly spaced from -1 to 1.
        outside: scores of a larger magnitude are not counted.
        counts: int64 [K, B], added to.
        nan_count: int64 [K], added to.

    Returns:
        how many scores were outside.
    """
    far_count = np.zeros(scores.shape[1], np.int64)
    run(_update, scores, edges, outside, counts, nan_count, far_count)
    return int(far_count.sum())
