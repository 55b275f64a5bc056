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

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from pairtrace.kernels.compiled import parallel, run

SAFE_LOW = np.float32(2.0**-80)
SAFE_HIGH = np.float32(2.0**126)
SCALE_UP = np.float32(2.0**100)
SCALE_DOWN = np.float32(2.0**-100)
ONE = np.float32(1.0)

# Rows that a thread holds in float32 at a time; a multiple of 4. They stay in its cache while the directions pass by.
TILE_ROWS = 16

# Reassociation lets LLVM keep several partial sums per lane. NaN and infinity keep their meaning: they decide results.
_FASTMATH = {"reassoc", "contract"}


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


@parallel
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


@numba.njit(fastmath=_FASTMATH)
def _sixteen_dots(rows: Any, units: Any, out: Any) -> None:
    """Products of four rows with four directions: each loaded value serves four sums, which stay in registers."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    u0, u1, u2, u3 = units[0], units[1], units[2], units[3]
    zero = np.float32(0)
    s00, s01, s02, s03 = zero, zero, zero, zero
    s10, s11, s12, s13 = zero, zero, zero, zero
    s20, s21, s22, s23 = zero, zero, zero, zero
    s30, s31, s32, s33 = zero, zero, zero, zero
    for j in range(r0.shape[0]):
        s00 += r0[j] * u0[j]
        s01 += r0[j] * u1[j]
        s02 += r0[j] * u2[j]
        s03 += r0[j] * u3[j]
        s10 += r1[j] * u0[j]
        s11 += r1[j] * u1[j]
        s12 += r1[j] * u2[j]
        s13 += r1[j] * u3[j]
        s20 += r2[j] * u0[j]
        s21 += r2[j] * u1[j]
        s22 += r2[j] * u2[j]
        s23 += r2[j] * u3[j]
        s30 += r3[j] * u0[j]
        s31 += r3[j] * u1[j]
        s32 += r3[j] * u2[j]
        s33 += r3[j] * u3[j]
    out[0, 0], out[0, 1], out[0, 2], out[0, 3] = s00, s01, s02, s03
    out[1, 0], out[1, 1], out[1, 2], out[1, 3] = s10, s11, s12, s13
    out[2, 0], out[2, 1], out[2, 2], out[2, 3] = s20, s21, s22, s23
    out[3, 0], out[3, 1], out[3, 2], out[3, 3] = s30, s31, s32, s33


@parallel
def _tiled(flat: Any, stride: int, units: Any, norms: Any, out: Any) -> None:
    count, K = out.shape
    width = units.shape[1]
    for tile in prange(-(-count // TILE_ROWS)):
        first = tile * TILE_ROWS
        held = min(TILE_ROWS, count - first)
        rows = np.zeros((TILE_ROWS, width), np.float32)
        for r in range(held):
            start = (first + r) * stride
            row = flat[start : start + width]
            scale = _scale_for(_sum_of_squares(row, ONE))
            factor = np.float32(ONE / _divisor(_sum_of_squares(row, scale), scale, norms, first + r))
            for j in range(width):
                rows[r, j] = (_decode(row[j]) * scale) * factor
        scores = np.empty((4, 4), np.float32)
        for k in range(0, K, 4):
            for r in range(0, held, 4):
                _sixteen_dots(rows[r : r + 4], units[k : k + 4], scores)
                for a in range(min(4, held - r)):
                    for b in range(min(4, K - k)):
                        out[first + r + a, k + b] = scores[a, b]


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
    run(_fused, flat, stride, units, norms, out)


def tiled_scores(flat: np.ndarray, stride: int, units: np.ndarray, norms: np.ndarray, out: np.ndarray) -> None:
    """Cosines of a block of rows with many directions (K > 1).

    `TILE_ROWS` rows at a time are divided by their norms in float32. A BLAS product needs less processor time beyond
    about 64 directions, but handing every block from Numba's threads to those of BLAS and back made it several times
    slower by the clock on a busy machine.

    Args:
        flat: as in `fused_scores`.
        stride: as in `fused_scores`.
        units: float32 [K', D] unit directions, K rounded up to a multiple of 4 with zero rows.
        norms: as in `fused_scores`.
        out: float32 [n, K], overwritten.
    """
    assert units.shape[0] == -(-out.shape[1] // 4) * 4
    run(_tiled, flat, stride, units, norms, out)
