"""float16 rows as float32: `half_to_float32`.

Letters: n rows, D width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Below this many values the call of a compiled kernel costs more than it saves.
SMALL_VALUES = 1 << 14


def half_to_float32(rows: np.ndarray) -> npt.NDArray[np.float32]:
    """Rows as float32, exactly: a copy. NumPy converts number by number and takes many times as long.

    Args:
        rows: float16 [n, D]; any strides, read-only and memory-mapped arrays included.
    """
    if rows.size < SMALL_VALUES:
        return rows.astype(np.float32)
    from pairtrace.kernels.half_numba import widen

    return widen(np.ascontiguousarray(rows).view(np.ndarray).view(np.uint16))
