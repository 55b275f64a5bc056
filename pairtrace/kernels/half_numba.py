"""The CPU kernel behind `pairtrace.kernels.half`: imported only when it runs, because Numba is heavy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from pairtrace.kernels.compiled import parallel, run


def _value_for(typingctx: Any, word: Any) -> Any:
    """float32 value of the bits of a float16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


_value: Any = intrinsic(_value_for)


@numba.njit
def _widen_row(words: Any, row: Any) -> None:
    for j in range(row.shape[0]):
        row[j] = _value(words[j])


@parallel
def _widen(words: Any, rows: Any) -> None:
    for i in prange(words.shape[0]):
        _widen_row(words[i], rows[i])


def widen(words: np.ndarray) -> np.ndarray:
    """The bits of float16 rows, uint16 [n, D] and contiguous, as float32."""
    # Read-only and writable arrays are types of their own to Numba: a read-only view compiles once.
    words = words.view()
    words.flags.writeable = False
    rows = np.empty(words.shape, np.float32)
    run(_widen, words, rows)
    return rows
