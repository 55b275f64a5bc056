"""Strings stored one after the other, brought into Arrow's layout without a Python object for each.

Letters: n strings.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_HEAD_BYTES = 4


def split_strings(body: npt.NDArray[np.uint8], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Offsets and bytes of strings in the vlen-utf8 encoding (numcodecs, Zarr v3).

    Args:
        body: uint8, contiguous: the number of strings, then the length in bytes and the bytes of each; numbers are
            uint32, little-endian.
        count: n, the number of strings expected.

    Returns:
        offsets int64 [n + 1] and data uint8: string i is `data[offsets[i] : offsets[i + 1]]`, UTF-8. This is Arrow's
        layout of large strings.

    Raises:
        ValueError: these are not the bytes of n strings; the message says why.
    """
    from pairtrace.kernels.strings_numba import split

    if body.size < _HEAD_BYTES:
        raise ValueError(f"its chunk has only {body.size} bytes")
    found = int.from_bytes(body[:_HEAD_BYTES].tobytes(), "little")
    if found != count:
        raise ValueError(f"its chunk holds {found} strings instead of {count}")
    length = body.size - _HEAD_BYTES * (count + 1)
    offsets, data = np.zeros(count + 1, np.int64), np.empty(max(length, 0), np.uint8)
    if length < 0 or not split(body, offsets, data):
        raise ValueError("the lengths of its strings are not those of its bytes")
    return offsets, data
