"""Euclidean norms of rows as they are stored: `row_norms`.

Letters: N rows, D width.

Squares are summed in float64, where those of float32 numbers neither overflow nor vanish: a norm is finite exactly when
its row is, and 0 exactly when its row is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pairtrace.errors import ConfigError
from pairtrace.kernels.int8 import ScaledRows

_IMPLEMENTATIONS = ("auto", "reference", "numba")

# Rows of the reference that are wide at a time.
_BLOCK_ROWS = 256


def row_norms(rows: np.ndarray | ScaledRows, *, impl: str = "auto") -> npt.NDArray[np.float64]:
    """Norms of rows, in the calling thread and with Python's lock released.

    Args:
        rows: [N, D] of float32, float16, or uint16 (the bits of bfloat16), or scaled int8.
        impl: "auto" (the same as "numba"), "reference" or "numba".

    Returns:
        float64 [N]: NaN or infinity for a row that holds one.

    Raises:
        ConfigError: the rows are of another type or shape, or there is no such implementation.
    """
    if impl not in _IMPLEMENTATIONS:
        raise ConfigError(f"impl must be one of {', '.join(_IMPLEMENTATIONS)}, not {impl!r}")
    values = rows.values if isinstance(rows, ScaledRows) else rows
    if values.ndim != 2 or (values is rows and values.dtype not in (np.float32, np.float16, np.uint16)):
        raise ConfigError(f"rows must be [N, D] of float32, float16 or uint16, not {values.dtype} {values.shape}")
    norms = np.empty(len(values))
    if impl == "reference":
        for start in range(0, len(values), _BLOCK_ROWS):
            wide = _float64(rows[start : start + _BLOCK_ROWS])
            norms[start : start + _BLOCK_ROWS] = np.sqrt(np.square(wide).sum(axis=1))
        return norms
    from pairtrace.kernels.norms_numba import norms_into

    columns = rows.column_scale if isinstance(rows, ScaledRows) else np.empty(0, np.float32)
    norms_into(np.ascontiguousarray(values), columns, norms)
    if isinstance(rows, ScaledRows):
        norms *= rows.row_scale
    return norms


def _float64(rows: np.ndarray | ScaledRows) -> npt.NDArray[np.float64]:
    if isinstance(rows, ScaledRows):
        scaled: npt.NDArray[np.float64] = rows.values * rows.row_scale[:, None].astype(np.float64)
        scaled *= rows.column_scale
        return scaled
    if rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    wide: npt.NDArray[np.float64] = rows.astype(np.float64)
    return wide
