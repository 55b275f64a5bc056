"""The CPU kernel behind `pairtrace.kernels.norms`: imported only when it runs, because Numba is heavy.

The type of a word says how it is decoded: float32 as it is, uint16 as the bits of a float16, int16 as the bits of a
bfloat16, int8 times the scale of its column.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pairtrace.kernels.compiled import call, single_threaded


def _widen_for(typingctx: Any, word: Any) -> Any:
    """float64 value of one stored word (see the module text)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, double = args[0], ir.DoubleType()
        if word == types.int8:
            return builder.sitofp(value, double)
        if word == types.uint16:
            value = builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        elif word == types.int16:
            bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            value = builder.bitcast(bits, ir.FloatType())
        return builder.fpext(value, double)

    return types.float64(word), codegen


_widen: Any = intrinsic(_widen_for)


# Reassociation lets LLVM keep several partial sums. NaN and infinity keep their meaning: they decide results.
@numba.njit(fastmath={"reassoc", "contract"})
def sum_of_squares(row: Any) -> Any:
    """Sum of the squares of a row [D] of any dtype that rows are stored in, float64."""
    total = 0.0
    for j in range(row.shape[0]):
        value = _widen(row[j])
        total += value * value
    return total


@numba.njit(fastmath={"reassoc", "contract"})
def scaled_sum_of_squares(row: Any, columns: Any) -> Any:
    """Sum of the squares of a row [D] whose values are multiplied by float64 `columns` [D]."""
    total = 0.0
    for j in range(row.shape[0]):
        value = _widen(row[j]) * columns[j]
        total += value * value
    return total


@single_threaded
def _norms(words: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = np.sqrt(sum_of_squares(words[i]))


@single_threaded
def _scaled_norms(words: Any, columns: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = np.sqrt(scaled_sum_of_squares(words[i], columns))


def norms_into(values: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """Norms of rows.

    Args:
        values: [N, D], contiguous: float32, float16, uint16 (the bits of bfloat16) or int8.
        columns: float32 [D] for int8, else [0].
        out: float64 [N], overwritten; of int8 rows without the scales of the rows.
    """
    if values.dtype == np.int8:
        call(_scaled_norms, _frozen(values), _frozen(columns), out)
        return
    bits = {"float16": np.uint16, "uint16": np.int16}.get(values.dtype.name, np.float32)
    call(_norms, _frozen(values.view(bits)), out)


def _frozen(values: np.ndarray) -> np.ndarray:
    """A read-only view, so that one compiled kernel serves mapped and other arrays."""
    view = values.view(np.ndarray)
    view.flags.writeable = False
    return view
