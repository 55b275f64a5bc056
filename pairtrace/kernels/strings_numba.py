"""The compiled part of `pairtrace.kernels.strings`: imported only when it runs, because Numba is heavy."""

from __future__ import annotations

from typing import Any

import numpy as np

from pairtrace.kernels.compiled import call, single_threaded


@single_threaded
def _split(body: Any, offsets: Any, data: Any) -> Any:
    position: Any = 4
    written: Any = 0
    for i in range(offsets.shape[0] - 1):
        if position + 4 > body.shape[0]:
            return False
        length = np.int64(0)
        for byte in range(4):
            length |= np.int64(body[position + byte]) << (8 * byte)
        position += 4
        if position + length > body.shape[0] or written + length > data.shape[0]:
            return False
        for j in range(length):
            data[written + j] = body[position + j]
        position += length
        written += length
        offsets[i + 1] = written
    return position == body.shape[0]


def split(body: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> bool:
    """Split an encoded chunk; False where lengths and bytes do not agree.

    Args:
        body: uint8, at least 4 bytes.
        offsets: int64 [n + 1], zeros, overwritten.
        data: uint8 [bytes of all strings], overwritten.
    """
    # Read-only and writable arrays are types of their own to Numba: a read-only view compiles once.
    body = body.view()
    body.flags.writeable = False
    return bool(call(_split, body, offsets, data))
