"""Rows whose checksum is compared by whoever reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from pairtrace.errors import StoreDamagedError
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.reader import ActivationStore
from tests.store.samples import make_manifest, write_store


def chunk_path(root: Path) -> Path:
    return root / "diff/5/c/0/0"


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(("dtype", "codec"), [("float16", "none"), ("int8", "none"), ("float16", "zstd:1")])
def test_a_checksum_left_to_the_caller_is_that_of_the_rows(tmp_path: Path, dtype: str, codec: str) -> None:
    write_store(tmp_path, make_manifest(dtype=dtype, codec=codec))
    store = ActivationStore.open(tmp_path)
    for (start, rows), (same, others, chunk) in zip(store.blocks(5), store.blocks_to_check(5), strict=True):
        assert start == same
        for one, other in zip(parts_of(rows), parts_of(others), strict=True):
            np.testing.assert_array_equal(one, other)
        assert chunk is None, "this reader compared it already"
    for _, rows, chunk in ActivationStore.open(tmp_path).blocks_to_check(5):
        if codec != "none":
            assert chunk is None
            continue
        assert chunk is not None
        np.testing.assert_array_equal(chunk.rows, parts_of(rows)[0])
        chunk.compare(google_crc32c.value(chunk.body.tobytes()))
        with pytest.raises(StoreDamagedError, match="array diff/5, shard 0"):
            chunk.compare(google_crc32c.value(chunk.body.tobytes()) ^ 1)
        break
    flip(chunk_path(tmp_path), 3)
    with pytest.raises(StoreDamagedError, match="array diff/5, shard 0"):
        for _, _, chunk in ActivationStore.open(tmp_path).blocks_to_check(5):
            assert chunk is not None
            chunk.compare(google_crc32c.value(chunk.body.tobytes()))
    chunk_path(tmp_path).unlink()
    with pytest.raises(StoreDamagedError, match=r"array diff/5, shard 0 .* missing"):
        next(ActivationStore.open(tmp_path).blocks_to_check(5))


def parts_of(rows: Any) -> list[np.ndarray]:
    return [rows.values, rows.row_scale, rows.column_scale] if isinstance(rows, ScaledRows) else [rows]
