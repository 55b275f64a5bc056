from __future__ import annotations

import numcodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.kernels.strings import split_strings


def encoded(values: list[str]) -> np.ndarray:
    """What the codec of the store writes."""
    return np.frombuffer(numcodecs.VLenUTF8().encode(np.array([*values, None], dtype=object)[:-1]), np.uint8)


def joined(offsets: np.ndarray, data: np.ndarray) -> list[str]:
    raw = data.tobytes()
    return [raw[start:stop].decode() for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=300), max_size=20))
def test_strings_come_back(values: list[str]) -> None:
    offsets, data = split_strings(encoded(values), len(values))
    assert offsets.dtype == np.int64 and data.dtype == np.uint8
    assert joined(offsets, data) == values


def test_bytes_that_are_no_such_strings_are_refused() -> None:
    whole = encoded(["one", "", "dreißig"])
    for body in (whole[:-1], np.append(whole, np.uint8(0)), whole[:6]):
        with pytest.raises(ValueError, match="lengths of its strings"):
            split_strings(body, 3)
    with pytest.raises(ValueError, match="3 strings instead of 4"):
        split_strings(whole, 4)
    with pytest.raises(ValueError, match="only 3 bytes"):
        split_strings(whole[:3], 3)
    # A length beyond the chunk, or beyond 2**31, reads nothing that is not there.
    for byte in range(4, 8):
        harmed = whole.copy()
        harmed[byte] ^= 0xFF
        with pytest.raises(ValueError, match="lengths of its strings"):
            split_strings(harmed, 3)
