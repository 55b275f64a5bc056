"""float16 as float32 against NumPy, for every number there is."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from pairtrace.kernels import half
from pairtrace.kernels.half import half_to_float32


@pytest.mark.parametrize("layout", ["contiguous", "read-only", "every second row", "every second column"])
@pytest.mark.parametrize("small", [0, 1 << 30])
def test_every_number_is_widened_exactly(layout: str, small: int) -> None:
    rows = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    if layout == "every second row":
        rows = np.repeat(rows, 2, axis=0)[::2]
    elif layout == "every second column":
        rows = np.repeat(rows, 2, axis=1)[:, ::2]
    elif layout == "read-only":
        rows.flags.writeable = False
    with patch.object(half, "SMALL_VALUES", small):
        wide = half_to_float32(rows)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, rows.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(rows))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (7, 1023)])
def test_awkward_shapes(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    with patch.object(half, "SMALL_VALUES", 0):
        np.testing.assert_array_equal(half_to_float32(rows), rows.astype(np.float32))
