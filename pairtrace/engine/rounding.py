"""Rows from one store dtype to another.

Letters: n rows of a shard, D width.
"""

from __future__ import annotations

import numpy as np

from pairtrace.kernels.int8 import ScaledRows, encode_int8
from pairtrace.store.layout import to_float32

# Largest finite value of each store dtype.
# The scales of int8 rows are float32 and take up to sqrt(n * D) times the largest value.
LARGEST = {"float16": 65504.0, "bfloat16": 3.3895314e38, "float32": float(np.finfo(np.float32).max), "int8": 1e30}
# Significant bits of each store dtype, the leading one included.
DIGITS = {"int8": 7, "bfloat16": 8, "float16": 11, "float32": 24}


def round_rows(rows: np.ndarray | ScaledRows, before: str, after: str) -> np.ndarray | ScaledRows:
    """Rows of a store of dtype `before` as a store of dtype `after` holds them, rounded to nearest even.

    Args:
        rows: [n, D] in the type of the store (bfloat16 as uint16, int8 with its scales), finite, and none beyond
            `LARGEST[after]`.
        before: their dtype.
        after: the dtype that is wanted; rows of the same dtype are returned as they are.
    """
    if before == after:
        return rows
    if after == "int8":
        return encode_int8(rows if isinstance(rows, np.ndarray) and before != "bfloat16" else to_float32(rows))
    wide = to_float32(rows)
    if after != "bfloat16":
        return wide.astype(after)
    bits = wide.view(np.uint32)
    # Adding half of what is cut off, less one where the bit before it is even, carries upwards when it must.
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16)
