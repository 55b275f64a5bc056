"""The CPU kernels behind `pairtrace.kernels.int8`: imported only when they run, because Numba is heavy.

Letters: n rows of a block, D width.

Products are taken in float64: no finite float32 row overflows, underflows or saturates. No result depends on the
number of threads: a row, or a column of all rows in their order, belongs to one thread.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import prange

from pairtrace.kernels.compiled import parallel, run
from pairtrace.kernels.norms_numba import scaled_sum_of_squares, sum_of_squares

# Columns of one task.
TASK_COLUMNS = 128


@parallel
def _norms(rows: Any, norms: Any) -> None:
    for i in prange(rows.shape[0]):
        norms[i] = np.sqrt(sum_of_squares(rows[i]))


@parallel
def _eighth_powers(rows: Any, norms: Any, sums: Any) -> None:
    width = rows.shape[1]
    for task in prange(-(-width // TASK_COLUMNS)):
        first = task * TASK_COLUMNS
        total = sums[first : min(first + TASK_COLUMNS, width)]
        for i in range(rows.shape[0]):
            if norms[i] == 0.0:
                continue
            factor = 1.0 / norms[i]
            row = rows[i, first : min(first + TASK_COLUMNS, width)]
            for j in range(total.shape[0]):
                value = np.float64(row[j]) * factor
                square = value * value
                fourth = square * square
                total[j] += fourth * fourth


@numba.njit
def _largest(row: Any, inverse: Any) -> Any:
    largest = 0.0
    for j in range(inverse.shape[0]):
        magnitude = abs(np.float64(row[j]) * inverse[j])
        largest = magnitude if magnitude > largest else largest
    return largest


@numba.njit
def _round_row(row: Any, inverse: Any, factor: Any, values: Any) -> None:
    for j in range(inverse.shape[0]):
        values[j] = np.int8(np.rint((np.float64(row[j]) * inverse[j]) * factor))


@parallel
def _encode(rows: Any, norms: Any, columns: Any, inverse: Any, steps: float, values: Any, scales: Any) -> None:
    for i in prange(rows.shape[0]):
        largest = _largest(rows[i], inverse)
        _round_row(rows[i], inverse, steps / largest if largest > 0.0 else 0.0, values[i])
        rounded = np.sqrt(scaled_sum_of_squares(values[i], columns))
        scales[i] = norms[i] / rounded if rounded > 0.0 else 0.0


def row_norms(rows: np.ndarray) -> np.ndarray:
    """Norms of float32 rows [n, D] as float64 [n]; not finite where a value is not."""
    norms = np.empty(len(rows))
    run(_norms, rows, norms)
    return norms


def add_eighth_powers(rows: np.ndarray, norms: np.ndarray, sums: np.ndarray) -> None:
    """Add the eighth powers of rows [n, D], each divided by its norm, to float64 [D]; rows of zeros add nothing."""
    run(_eighth_powers, rows, norms, sums)


def encode_rows(
    rows: np.ndarray, norms: np.ndarray, column_scale: np.ndarray, steps: int, values: np.ndarray, scales: np.ndarray
) -> None:
    """Round a block of rows.

    Args:
        rows: float32 [n, D], contiguous, finite.
        norms: float64 [n], as from `row_norms`.
        column_scale: float32 [D], above 0.
        steps: the magnitude that the largest value of a row becomes.
        values: int8 [n, D], overwritten.
        scales: float64 [n], overwritten: those that give the rounded rows the norms that they had.
    """
    columns = column_scale.astype(np.float64)
    run(_encode, rows, norms, columns, 1.0 / columns, float(steps), values, scales)
