"""Cosines and checksum of the same bytes, read from memory once.

Letters: n rows, D width, K directions.

A task takes the checksum of some rows and then scores them, while they are in its core's second cache. One after the
other, checksum and scores of a whole chunk would each wait for the memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pairtrace.kernels.checksum import SMALL_BYTES, check_bytes, crc32c
from pairtrace.kernels.cosine import FUSED_DIRECTIONS, Directions, Impl, RowDtype, Rows, cosine_scores
from pairtrace.kernels.cosine_inputs import check_rows, host_rows, is_tensor, prepared_directions


def cosine_scores_and_checksum(
    rows: Rows,
    directions: Directions,
    body: np.ndarray,
    *,
    impl: Impl = "auto",
    row_dtype: RowDtype | None = None,
) -> tuple[Any, int]:
    """Cosine of every row with every direction, and the CRC-32C of the bytes that hold the rows.

    Scores have the bits that `cosine_scores` gives.

    Args:
        rows: as for `cosine_scores`; contiguous rows at the beginning of `body` are read together with it.
        directions: as for `cosine_scores`.
        body: uint8 [bytes], contiguous: the rows and whatever follows them.
        impl: as for `cosine_scores`.
        row_dtype: as for `cosine_scores`.

    Returns:
        float32 [n, K], and the checksum.

    Raises:
        ConfigError, DirectionError, MissingDependencyError: as for `cosine_scores` and `crc32c`.
    """
    check_rows(rows, row_dtype)
    check_bytes(body)
    units = prepared_directions(directions, rows.shape[1])
    if impl in ("auto", "numba") and len(units) <= FUSED_DIRECTIONS and not is_tensor(rows) and len(rows):
        side = host_rows(rows, row_dtype)
        words = side.words
        whole = side.dense and words.nbytes <= body.nbytes and words.flags.c_contiguous
        if whole and body.nbytes >= SMALL_BYTES and words.ctypes.data == body.ctypes.data:
            from pairtrace.kernels import checksum_numba, cosine_checked_numba

            if checksum_numba.instruction_available():
                return cosine_checked_numba.scores_and_checksum(side, units.padded, len(units), body)
    return cosine_scores(rows, units, impl=impl, row_dtype=row_dtype), crc32c(body)
