"""The compiled part of `pairtrace.kernels.strings`: imported only when it runs, because Numba is heavy."""

from __future__ import annotations

from typing import Any

import numpy as np

from pairtrace.kernels.compiled import call, single_threaded


@single_threaded
def _split(body: Any, offsets: Any, data: Any) -> Any:
    # Unsigned throughout: an index that may be negative is looked at twice.
    size, room, head = np.uint64(body.shape[0]), np.uint64(data.shape[0]), np.uint64(4)
    position: Any = head
    written: Any = np.uint64(0)
    for i in range(offsets.shape[0] - 1):
        if position + head > size:
            return False
        length: Any = np.uint64(0)
        for byte in range(4):
            length |= np.uint64(body[position + np.uint64(byte)]) << np.uint64(8 * byte)
        position += head
        if position + length > size or written + length > room:
            return False
        for j in range(length):
            data[written + np.uint64(j)] = body[position + np.uint64(j)]
        position += length
        written += length
        offsets[i + 1] = written
    return position == size


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
