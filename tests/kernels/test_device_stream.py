"""Streams of host rows against scores of all rows at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairtrace.errors import ConfigError, DirectionError
from pairtrace.kernels.cosine import cosine_scores
from pairtrace.kernels.device_stream import _tensor, stream_scores
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from tests.kernels.rows import TOLERANCE, stored


def in_blocks(rows: np.ndarray | ScaledRows, size: int) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _check(device: str, dtype: str, size: int, directions: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.standard_normal((50, 36))
    values[7], values[8, 3] = 0.0, 1e-3
    bank = rng.standard_normal((directions, 36))
    if dtype == "int8":
        rows, settings = encode_int8(values), {}
    else:
        rows, settings, _ = stored(values, dtype)
    expected = cosine_scores(rows, bank, impl="reference", **settings)
    kept = list(stream_scores(in_blocks(rows, size), bank, device, **settings))
    assert [start for start, _ in kept] == list(range(0, 50, size))
    scores = np.concatenate([block for _, block in kept])
    assert scores.dtype == np.float32
    assert np.isnan(scores[7]).all()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2 * TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [7, 64])
def test_streams_on_the_host(dtype: str, size: int) -> None:
    _check("cpu", dtype, size, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("directions", [1, 3, 20])
def test_streams_on_the_gpu(dtype: str, directions: int) -> None:
    for size in (1, 7, 25, 50, 64):
        _check("cuda", dtype, size, directions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_page_locked_rows_and_an_early_end_on_the_gpu() -> None:
    rows = torch.randn(5000, 512).half().pin_memory().numpy()
    bank = np.random.default_rng(0).standard_normal((2, 512))
    expected = cosine_scores(rows, bank, impl="reference")
    stream = stream_scores(in_blocks(rows, 1000), bank, "cuda")
    for start, scores in stream:
        np.testing.assert_allclose(scores, expected[start : start + 1000], rtol=0, atol=2 * TOLERANCE)
        if start == 3000:
            break
    stream.close()  # type: ignore[attr-defined]


def test_an_empty_stream() -> None:
    assert list(stream_scores(iter(()), np.ones(4), "cpu")) == []


def test_unusable_arguments_are_refused() -> None:
    rows = np.ones((2, 4), np.float32)
    with pytest.raises(ConfigError, match="meta"):
        stream_scores([(0, rows)], np.ones(4), "meta")
    with pytest.raises(DirectionError, match="width 3"):
        list(stream_scores([(0, rows)], np.ones(3), "cpu"))
    with pytest.raises(ConfigError, match="float64"):
        list(stream_scores([(0, rows.astype(np.float64))], np.ones(4), "cpu"))


def test_read_only_rows_are_read_where_they_are(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float16).reshape(3, 4)
    rows.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float16, "r", shape=(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = _tensor(mapped[1:])
    assert tensor.data_ptr() == mapped[1:].ctypes.data
    np.testing.assert_array_equal(tensor.numpy(), rows[1:])
