"""The CPU kernels behind `pairtrace.kernels.cosine`: imported only when they run, because Numba is heavy.

Letters: n rows of a block, D width, K directions.

`fused_scores` reads each row once and sums its square and its products in registers, `normalized_rows` writes rows
divided by their norms for a matrix product. Both are made of the generated loops of `pairtrace.kernels.cosine_llvm`,
which also lists the row formats.

Range: a sum of squares in float32 overflows for rows (float32, bfloat16) with a norm above about 2**63 and loses digits
for norms below about 2**-63. A row whose sum is outside [SAFE_LOW, SAFE_HIGH] is computed again, multiplied by an exact
power of two that cancels in the cosine: no finite non-zero row scores NaN or 0 for lack of range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.extending import overload

from pairtrace.kernels.compiled import call, parallel, run, single_threaded
from pairtrace.kernels.cosine_inputs import DIRECTION_GROUP, HostRows
from pairtrace.kernels.cosine_llvm import read_float32, row_sums, store_row

SAFE_LOW = np.float32(2.0**-80)
SAFE_HIGH = np.float32(2.0**126)
SCALE_UP = np.float32(2.0**100)
SCALE_DOWN = np.float32(2.0**-100)
ONE = np.float32(1.0)

# Rows that are read side by side; with as many directions their sums fit into 32 vector registers.
GROUP = DIRECTION_GROUP

NO_VALUES = np.empty(0, np.float32)


@dataclass(frozen=True)
class Side:
    """Rows of one side of the difference, as the kernels read them.

    Attributes:
        words: float32, uint16 (float16 bits), int16 (bfloat16 bits) or int8; the first word of row i is `i * stride`
            words from its start, each row contiguous. Booleans where there is no such side.
        stride: distance between rows in words.
        columns: float32 [D] column scales of int8 words, else empty; contiguous.
        row_scale: float32 [n] row scales of int8 words, else empty; contiguous.
    """

    words: np.ndarray
    stride: int
    columns: np.ndarray
    row_scale: np.ndarray

    @classmethod
    def of(cls, rows: HostRows) -> Side:
        """At least one row, in place where rows are dense, else copied."""
        words = rows.words if rows.dense else np.ascontiguousarray(rows.words)
        words = words.view(np.uint16) if words.dtype == np.float16 else words
        n, width = words.shape
        stride = words.strides[0] // words.itemsize if n > 1 else width
        scales = (rows.column_scale, rows.row_scale)
        columns, row_scale = (NO_VALUES if scale is None else np.ascontiguousarray(scale) for scale in scales)
        return cls(words, stride, columns, row_scale)

    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take: a word, whose type says the format, and addresses."""
        word = self.words.dtype.type(0)
        return word, self.words.ctypes.data, self.stride, self.columns.ctypes.data, self.row_scale.ctypes.data


NO_SIDE = Side(np.empty(0, np.bool_), 0, NO_VALUES, NO_VALUES)


def _row_factors(rows: Any, minus: Any, i: int) -> Any:
    """Factors of row i on both sides (float32), and how many times too large they make its difference (float64).

    Row scales of int8 rows cancel in the cosine of a single side, and so does an exact power of two on both sides of a
    difference: it keeps the larger of their two scales near 1.
    """
    raise NotImplementedError("compiled code only")


@overload(_row_factors)
def _overload_row_factors(rows: Any, minus: Any, i: Any) -> Any:
    def of_values(rows: Any, minus: Any, i: Any) -> Any:
        return ONE, ONE, 1.0

    def of_one_scaled_side(rows: Any, minus: Any, i: Any) -> Any:
        row_scale = np.float64(read_float32(rows[4], i))
        usable = row_scale > 0 and row_scale < np.inf
        return ONE, ONE, 1.0 / row_scale if usable else np.nan

    def of_two_scaled_sides(rows: Any, minus: Any, i: Any) -> Any:
        row_scale = np.float64(read_float32(rows[4], i))
        minus_scale = np.float64(read_float32(minus[4], i))
        _, exponent = math.frexp(max(row_scale, minus_scale))
        scale = math.ldexp(1.0, -exponent)
        return np.float32(row_scale * scale), np.float32(minus_scale * scale), scale

    if rows.types[0] != types.int8:
        return of_values
    return of_one_scaled_side if minus.types[0] == types.boolean else of_two_scaled_sides


@numba.njit
def _gains(squares: Any) -> Any:
    """Powers of two for both sides before their subtraction, which may overflow, and for their difference."""
    if squares < SAFE_LOW:
        return ONE, SCALE_UP
    if squares <= SAFE_HIGH:
        return ONE, ONE
    return SCALE_DOWN, ONE  # too large, infinite or NaN


@numba.njit
def _divisor(squares: Any, scale: Any, norms: int, i: int) -> Any:
    """Norm of the row as computed, which is `scale` times the stored one (float64); NaN where it has no cosine."""
    if not (squares > 0 and squares < np.inf and scale > 0):
        return np.nan
    if norms == 0:
        return np.sqrt(np.float64(squares))
    norm = np.float64(read_float32(norms, i))
    if not (norm > 0 and norm < np.inf):
        return np.nan
    return norm * scale


@numba.njit
def _four_sums(rows: Any, minus: Any, units: int, unit_starts: Any, width: int, i: int, squared: Any) -> Any:
    """Sums of rows i to i + 3, without gains; meanwhile the four rows after them are prefetched."""
    word, address, stride, columns, _ = rows
    minus_word, minus_address, minus_stride, minus_columns, _ = minus
    a, minus_a, _ = _row_factors(rows, minus, i)
    b, minus_b, _ = _row_factors(rows, minus, i + 1)
    c, minus_c, _ = _row_factors(rows, minus, i + 2)
    d, minus_d, _ = _row_factors(rows, minus, i + 3)
    return row_sums(
        word,
        address,
        (i * stride, (i + 1) * stride, (i + 2) * stride, (i + 3) * stride),
        columns,
        (a, b, c, d),
        minus_word,
        minus_address,
        (i * minus_stride, (i + 1) * minus_stride, (i + 2) * minus_stride, (i + 3) * minus_stride),
        minus_columns,
        (minus_a, minus_b, minus_c, minus_d),
        ONE,
        units,
        unit_starts,
        width,
        (GROUP * stride, GROUP * minus_stride),
        squared,
    )


@numba.njit
def _one_row(rows: Any, minus: Any, i: int, before: Any) -> Any:
    """The arguments of `row_sums` and `store_row` that describe row i with a gain before the subtraction."""
    word, address, stride, columns, _ = rows
    minus_word, minus_address, minus_stride, minus_columns, _ = minus
    factor, minus_factor, _ = _row_factors(rows, minus, i)
    row = word, address, (i * stride,), columns, (factor * before,)
    minus_row = minus_word, minus_address, (i * minus_stride,), minus_columns, (minus_factor * before,)
    return row, minus_row


@numba.njit
def _ranged_sums(rows: Any, minus: Any, units: int, unit_starts: Any, width: int, i: int) -> Any:
    """Sums of row i, with the gains that keep them in range, and these gains."""
    before, after = ONE, ONE
    for _ in range(2):
        row, minus_row = _one_row(rows, minus, i, before)
        sums = row_sums(*row, *minus_row, after, units, unit_starts, width, None, True)
        if before != ONE or after != ONE:
            break
        before, after = _gains(sums[0])
        if before == ONE and after == ONE:
            break
    return sums, before, after


@numba.njit
def score_group(
    rows: Any, minus: Any, units: int, unit_starts: Any, width: int, norms: int, out: Any, first: int, k: int
) -> None:
    """Scores of up to four rows from `first` on with the directions k, k + 1, ... at `unit_starts`."""
    C = len(unit_starts)
    whole = first + GROUP <= out.shape[0]
    if whole:
        sums = _four_sums(rows, minus, units, unit_starts, width, first, True)
    for r in range(min(GROUP, out.shape[0] - first)):
        i = first + r
        scale = _row_factors(rows, minus, i)[2]
        if whole and sums[r * (1 + C)] >= SAFE_LOW and sums[r * (1 + C)] <= SAFE_HIGH:
            divisor = _divisor(sums[r * (1 + C)], scale, norms, i)
            for c in range(min(C, out.shape[1] - k)):
                out[i, k + c] = np.float64(sums[r * (1 + C) + 1 + c]) / divisor
        else:
            own, before, after = _ranged_sums(rows, minus, units, unit_starts, width, i)
            divisor = _divisor(own[0], scale * np.float64(before) * np.float64(after), norms, i)
            for c in range(min(C, out.shape[1] - k)):
                out[i, k + c] = np.float64(own[1 + c]) / divisor


@numba.njit
def score_group_in_turns(rows: Any, minus: Any, units: int, width: int, norms: int, out: Any, first: int) -> None:
    """`score_group` with all directions, four at a time."""
    for k in range(0, out.shape[1], GROUP):
        score_group(rows, minus, units, _four_starts(k, width), width, norms, out, first, k)


@numba.njit
def _four_starts(k: int, width: int) -> Any:
    """First values of the directions k to k + 3."""
    return k * width, (k + 1) * width, (k + 2) * width, (k + 3) * width


@numba.njit
def _score_scaled_group(
    rows: Any,
    minus: Any,
    units: int,
    weights: int,
    unit_starts: Any,
    width: int,
    norms: int,
    out: Any,
    first: int,
    k: int,
) -> None:
    """`score_group` for int8 rows with given norms: finite as they are, they need no sum of squares.

    With `weights`, the directions times the columns' scales, three instructions per vector are left of five, which,
    and not the memory, would set the pace. A row whose products might say that it is zero or out of range is left to
    `score_group`.
    """
    C = len(unit_starts)
    if first + GROUP > out.shape[0]:
        score_group(rows, minus, units, unit_starts, width, norms, out, first, k)
        return
    word, address, stride, _, _ = rows
    ones = (ONE, ONE, ONE, ONE)
    starts = (first * stride, (first + 1) * stride, (first + 2) * stride, (first + 3) * stride)
    nothing = (0, 0, 0, 0)
    sums = row_sums(
        *(word, address, starts, None, ones),
        *(False, 0, nothing, 0, ones),
        ONE,
        weights,
        unit_starts,
        width,
        (GROUP * stride, 0),
        None,
    )
    for r in range(GROUP):
        i = first + r
        divisor = _divisor(ONE, _row_factors(rows, minus, i)[2], norms, i)
        for c in range(min(C, out.shape[1] - k)):
            size = abs(sums[r * C + c])
            if not (size >= SAFE_LOW and size <= SAFE_HIGH):
                score_group(rows, minus, units, unit_starts, width, norms, out, first, k)
                return
            out[i, k + c] = np.float64(sums[r * C + c]) / divisor


@parallel
def _one_direction(rows: Any, minus: Any, units: int, width: int, norms: int, out: Any) -> None:
    for group in prange(-(-out.shape[0] // GROUP)):
        score_group(rows, minus, units, (0,), width, norms, out, group * GROUP, 0)


@parallel
def _many_directions(rows: Any, minus: Any, units: int, width: int, norms: int, out: Any) -> None:
    for group in prange(-(-out.shape[0] // GROUP)):
        score_group_in_turns(rows, minus, units, width, norms, out, group * GROUP)


@parallel
def _scaled_rows_one_direction(
    rows: Any, minus: Any, units: int, weights: int, width: int, norms: int, out: Any
) -> None:
    for group in prange(-(-out.shape[0] // GROUP)):
        _score_scaled_group(rows, minus, units, weights, (0,), width, norms, out, group * GROUP, 0)


@parallel
def _scaled_rows_many_directions(
    rows: Any, minus: Any, units: int, weights: int, width: int, norms: int, out: Any
) -> None:
    for group in prange(-(-out.shape[0] // GROUP)):
        for k in range(0, out.shape[1], GROUP):
            starts = _four_starts(k, width)
            _score_scaled_group(rows, minus, units, weights, starts, width, norms, out, group * GROUP, k)


@single_threaded
def _normalized(rows: Any, minus: Any, norms: int, first: int, out: int, count: int, width: int) -> None:
    for r in range(count):
        i = first + r
        whole = r - r % GROUP + GROUP <= count
        if whole and r % GROUP == 0:
            sums = _four_sums(rows, minus, 0, (), width, i, True)
        before, after = ONE, ONE
        if whole and sums[r % GROUP] >= SAFE_LOW and sums[r % GROUP] <= SAFE_HIGH:
            squares = sums[r % GROUP]
        else:
            own, before, after = _ranged_sums(rows, minus, 0, (), width, i)
            squares = own[0]
        scale = _row_factors(rows, minus, i)[2] * np.float64(before) * np.float64(after)
        factor = np.float32(1.0 / _divisor(squares, scale, norms, i))
        row, minus_row = _one_row(rows, minus, i, before)
        store_row(*row, *minus_row, after, factor, out, r * width, width)


def _address(values: np.ndarray | None) -> int:
    """Where the values are; 0 where there are none."""
    return 0 if values is None else values.ctypes.data


def fused_scores(
    rows: Side, minus: Side, directions: np.ndarray, width: int, norms: np.ndarray | None, out: np.ndarray
) -> None:
    """Cosines of a block of rows, or differences of rows, with a few directions: each row is read from memory once.

    Args:
        rows: n rows.
        minus: n rows to subtract, of the same format, or `NO_SIDE`.
        directions: `UnitDirections.padded`.
        width: D.
        norms: float32 [n] norms to use instead of the rows' own, contiguous.
        out: float32 [n, K], overwritten.
    """
    one = out.shape[1] == 1
    sides = rows.arguments(), minus.arguments(), directions.ctypes.data
    if norms is not None and minus is NO_SIDE and rows.words.dtype == np.int8:
        weights = directions.reshape(-1, width) * rows.columns
        kernel = _scaled_rows_one_direction if one else _scaled_rows_many_directions
        run(kernel, *sides, weights.ctypes.data, width, _address(norms), out)
    else:
        run(_one_direction if one else _many_directions, *sides, width, _address(norms), out)


def normalized_rows(rows: Side, minus: Side, norms: np.ndarray | None, first: int, out: np.ndarray) -> None:
    """Rows, or differences of rows, divided by their norms; NaN where they have none. Runs on the caller's thread.

    Args:
        rows: as in `fused_scores`.
        minus: as in `fused_scores`.
        norms: as in `fused_scores`.
        first: row that goes to `out[0]`.
        out: float32 [m, D], contiguous, overwritten.
    """
    call(_normalized, rows.arguments(), minus.arguments(), _address(norms), first, out.ctypes.data, *out.shape)
