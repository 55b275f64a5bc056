"""Cosines with many directions as matrix products: imported only when it runs, because Numba is heavy.

Letters: n rows of a call, D width, K directions.

Every thread takes one block of rows after the other, writes it in float32 divided by its norms into a buffer of its
own, and multiplies it. The blocks follow from the shape alone, so the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pairtrace.kernels.cosine_numba import Side, normalized_rows
from pairtrace.kernels.shared_work import share

# Float32 values of a block of rows or of its scores: 4 MB. Smaller blocks read the directions more often, larger ones
# leave the caches.
BLOCK_VALUES = 1 << 20


def block_rows(width: int, directions: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_VALUES // max(width, directions))


def whole_blocks(rows: int, width: int, directions: int) -> int:
    """At most `rows` rows that are whole blocks, but at least one block: scored alone they have the same bits."""
    size = block_rows(width, directions)
    return max(size, rows // size * size)


def product_scores(rows: Side, minus: Side, columns: np.ndarray, norms: np.ndarray | None, out: np.ndarray) -> None:
    """Cosines of rows, or differences of rows, with many directions.

    Args:
        rows: n rows.
        minus: n rows to subtract, of the same format, or `NO_SIDE`.
        columns: float32 [D, K], `UnitDirections.columns`.
        norms: float32 [n] norms to use instead of the rows' own, contiguous.
        out: float32 [n, K], contiguous, overwritten.
    """
    n = len(out)
    width, K = columns.shape
    size = block_rows(width, K)
    starts = range(0, n, size)

    def score_blocks(starts: Iterator[int]) -> None:
        buffer = np.empty((min(size, n), width), np.float32)
        for start in starts:
            block = buffer[: min(size, n - start)]
            normalized_rows(rows, minus, norms, start, block)
            np.dot(block, columns, out=out[start : start + size])

    share(score_blocks, starts)
