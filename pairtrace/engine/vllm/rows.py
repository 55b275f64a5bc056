"""Rows of pairs on their way out of a worker: one run of bytes per step, in the layout that `PairPooler` packs.

norm float32 [n, L], checks float32 [n, 3], difference [n, L, D], and with sides chosen and rejected [n, L, D]; checks
are the largest magnitude of what is stored, and 1 where the mean of chosen, then of rejected, is finite.

Legend: n pairs, L layers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows.

    Attributes:
        norm: float32 [n, L].
        checks: float32 [n, 3].
        kept: difference, then chosen and rejected with sides, each [n, L, D]; bfloat16 as its uint16 bits.
    """

    norm: np.ndarray
    checks: np.ndarray
    kept: list[np.ndarray]


def wire_dtype(store_dtype: str) -> str:
    """What the workers cast to: rows of an int8 store are rounded when their whole shard is there."""
    return "float32" if store_dtype == "int8" else store_dtype


def unpack_rows(packed: bytes, pairs: int, layers: int, width: int, store_dtype: str, sides: bool) -> Rows:
    """Read back what `PairPooler` packed of `pairs` pairs."""
    stored = np.dtype(np.uint16 if store_dtype == "bfloat16" else wire_dtype(store_dtype))
    norm = np.frombuffer(packed, np.float32, pairs * layers).reshape(pairs, layers)
    checks = np.frombuffer(packed, np.float32, 3 * pairs, offset=norm.nbytes).reshape(pairs, 3)
    values = np.frombuffer(packed, stored, offset=norm.nbytes + checks.nbytes)
    return Rows(norm, checks, list(values.reshape(3 if sides else 1, pairs, layers, width)))
