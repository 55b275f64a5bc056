"""The CPU kernels behind `pairtrace.kernels.cosine`: imported only when they run, because Numba is heavy.

Letters: n rows of a block, D width, K directions.

One source serves three row formats; the type of a word says how it is decoded:
`float32` as it is, `uint16` as the bits of a float16, `int16` as the bits of a bfloat16.
Rows arrive as one flat read-only array and a row stride, so contiguous and row-strided rows share compiled code.

Range: a sum of squares in float32 overflows for rows (float32, bfloat16) with a norm above about 2**63 and loses digits
for norms below about 2**-63. A row whose sum is outside [SAFE_LOW, SAFE_HIGH] is computed again, multiplied by an exact
power of two that cancels in the cosine: no finite non-zero row scores NaN or 0 for lack of range.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

SAFE_LOW = np.float32(2.0**-80)
SAFE_HIGH = np.float32(2.0**126)
SCALE_UP = np.float32(2.0**100)
SCALE_DOWN = np.float32(2.0**-100)
ONE = np.float32(1.0)

# Reassociation lets LLVM keep several partial sums per lane. NaN and infinity keep their meaning: they decide results.
_FASTMATH = {"reassoc", "contract"}

# Numba's fallback threading layer ends the process when two Python threads enter a parallel region at once.
_PARALLEL_REGION = threading.Lock()


def _parallel(function: Callable[..., Any]) -> Any:
    """Compile for several threads, cached on disk where a cache directory can be written."""
    try:
        return numba.njit(parallel=True, cache=True)(function)
    except RuntimeError as error:  # "no locator available": neither the package nor the user cache is writable
        logger.debug("compiled kernels are not cached: %s", error)
        return numba.njit(parallel=True)(function)


def _run(kernel: Any, *arguments: Any) -> None:
    with _PARALLEL_REGION:
        try:
            kernel(*arguments)
        except OSError as error:  # the cache could not be written (full disk); the compiled code is there all the same
            logger.debug("compiled kernels are not cached: %s", error)
            kernel(*arguments)


def _decoder_for(typingctx: Any, word: Any) -> Any:
    """float32 value of one stored word (see the module text)."""
    if word == types.float32:

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return args[0]

    elif word == types.uint16:

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    elif word == types.int16:

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())

    else:
        return None
    return types.float32(word), codegen


_decode: Any = intrinsic(_decoder_for)


@numba.njit(fastmath=_FASTMATH)
def _one_dot(row: Any, unit: Any, scale: Any) -> Any:
    squares = np.float32(0)
    dot = np.float32(0)
    for j in range(unit.shape[0]):
        value = _decode(row[j]) * scale
        squares += value * value
        dot += value * unit[j]
    return squares, dot


@numba.njit(fastmath=_FASTMATH)
def _four_dots(row: Any, units: Any, k: int, scale: Any) -> Any:
    first, second, third, fourth = units[k], units[k + 1], units[k + 2], units[k + 3]
    squares = np.float32(0)
    a = np.float32(0)
    b = np.float32(0)
    c = np.float32(0)
    d = np.float32(0)
    for j in range(first.shape[0]):
        value = _decode(row[j]) * scale
        squares += value * value
        a += value * first[j]
        b += value * second[j]
        c += value * third[j]
        d += value * fourth[j]
    return squares, a, b, c, d


@numba.njit(fastmath=_FASTMATH)
def _sum_of_squares(row: Any, scale: Any) -> Any:
    squares = np.float32(0)
    for j in range(row.shape[0]):
        value = _decode(row[j]) * scale
        squares += value * value
    return squares


@numba.njit
def _scale_for(squares: Any) -> Any:
    if squares < SAFE_LOW:
        return SCALE_UP
    if squares <= SAFE_HIGH:
        return ONE
    return SCALE_DOWN  # too large, infinite or NaN


@numba.njit
def _divisor(squares: Any, scale: Any, norms: Any, i: int) -> Any:
    """Norm of the scaled row (float64), or NaN where the row has no cosine."""
    if not (squares > 0 and squares < np.inf):
        return np.nan
    if norms.shape[0] == 0:
        return np.sqrt(np.float64(squares))
    norm = np.float64(norms[i])
    if not (norm > 0 and norm < np.inf):
        return np.nan
    return norm * np.float64(scale)


@_parallel
def _fused(flat: Any, stride: int, units: Any, norms: Any, out: Any) -> None:
    width = units.shape[1]
    count = out.shape[1]
    for i in prange(out.shape[0]):
        row = flat[i * stride : i * stride + width]
        if count == 1:
            scale = ONE
            squares, dot = _one_dot(row, units[0], scale)
            if not (squares >= SAFE_LOW and squares <= SAFE_HIGH):
                scale = _scale_for(squares)
                squares, dot = _one_dot(row, units[0], scale)
            out[i, 0] = np.float64(dot) / _divisor(squares, scale, norms, i)
        else:
            scale = ONE
            for k in range(0, count, 4):
                squares, a, b, c, d = _four_dots(row, units, k, scale)
                if k == 0 and not (squares >= SAFE_LOW and squares <= SAFE_HIGH):
                    scale = _scale_for(squares)
                    squares, a, b, c, d = _four_dots(row, units, k, scale)
                divisor = _divisor(squares, scale, norms, i)
                out[i, k] = np.float64(a) / divisor
                if k + 1 < count:
                    out[i, k + 1] = np.float64(b) / divisor
                if k + 2 < count:
                    out[i, k + 2] = np.float64(c) / divisor
                if k + 3 < count:
                    out[i, k + 3] = np.float64(d) / divisor


@_parallel
def _unit_rows(flat: Any, stride: int, norms: Any, out: Any) -> None:
    width = out.shape[1]
    for i in prange(out.shape[0]):
        row = flat[i * stride : i * stride + width]
        scale = _scale_for(_sum_of_squares(row, ONE))
        squares = _sum_of_squares(row, scale)
        factor = np.float32(ONE / _divisor(squares, scale, norms, i))
        for j in range(width):
            out[i, j] = (_decode(row[j]) * scale) * factor


def fused_scores(flat: np.ndarray, stride: int, units: np.ndarray, norms: np.ndarray, out: np.ndarray) -> None:
    """Cosines of a block of rows with a few directions: each row is read from memory once.

    Args:
        flat: float32, uint16 (float16 bits) or int16 (bfloat16 bits), one-dimensional, contiguous, read-only:
            row i is `flat[i * stride : i * stride + D]`.
        stride: distance between rows in words.
        units: float32 [K', D] unit directions; K' = 1 for K = 1, else K rounded up to a multiple of 4 with zero rows.
        norms: float32 [n] norms to use instead of the rows' own, or [0].
        out: float32 [n, K], overwritten.
    """
    assert units.shape[0] == (1 if out.shape[1] == 1 else -(-out.shape[1] // 4) * 4)
    _run(_fused, flat, stride, units, norms, out)


def unit_rows(flat: np.ndarray, stride: int, norms: np.ndarray, out: np.ndarray) -> None:
    """Divide each row by its norm: the left side of a matrix product with many directions.

    Args:
        flat: as in `fused_scores`.
        stride: as in `fused_scores`.
        norms: as in `fused_scores`.
        out: float32 [n, D], overwritten; NaN throughout in rows without a cosine.
    """
    _run(_unit_rows, flat, stride, norms, out)
