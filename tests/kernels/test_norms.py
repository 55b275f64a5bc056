"""Norms of stored rows against float64 sums of exact values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels import norms_numba
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.kernels.norms import row_norms

DTYPES = ("float32", "float16", "bfloat16", "int8")
WIDTHS = (1, 2, 7, 64, 1023, 4096)
EXTREMES = {
    "float32": (3e38, 1e-38, 1e-45),
    "float16": (65504.0, 6e-8, 0.0),
    "bfloat16": (3e38, 1e-38, 1e-40),
    "int8": (127.0, 1.0, 0.0),
}


def stored(dtype: str, n: int, width: int, seed: int) -> np.ndarray | ScaledRows:
    """Rows of very different size, among them the largest and smallest that the type holds, and zeros."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(n, width)) * 10.0 ** rng.integers(-4, 4, (n, 1))
    if dtype == "int8":
        values = rng.integers(-127, 128, (n, width)).astype(np.int8)
        values[rng.integers(0, 3, n) == 0] = 0
        scales = [(10.0 ** rng.uniform(-30, 30, size)).astype(np.float32) for size in (n, width)]
        return ScaledRows(values, *scales)
    for row, value in enumerate(EXTREMES[dtype][:n]):
        wide[row] = value
    rows = wide.astype(np.float32)
    return (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rows.astype(dtype)


def exact(rows: np.ndarray | ScaledRows) -> list[float]:
    """Number by number, summed without rounding."""
    if isinstance(rows, ScaledRows):
        table = [
            [int(v) * float(c) * float(s) for v, c in zip(row, rows.column_scale, strict=True)]
            for row, s in zip(rows.values, rows.row_scale, strict=True)
        ]
    elif rows.dtype == np.uint16:
        table = [[float(np.uint32(int(v) << 16).view(np.float32)) for v in row] for row in rows]
    else:
        table = [[float(v) for v in row] for row in rows]
    return [math.sqrt(math.fsum(v * v for v in row)) for row in table]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(0, 5),
    width=st.sampled_from(WIDTHS),
    seed=st.integers(0, 10_000),
    impl=st.sampled_from(["reference", "numba"]),
)
def test_against_exact_sums(dtype: str, n: int, width: int, seed: int, impl: str) -> None:
    rows = stored(dtype, n, width, seed)
    norms = row_norms(rows, impl=impl)
    assert norms.dtype == np.float64 and norms.shape == (n,)
    np.testing.assert_allclose(norms, exact(rows), rtol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_is_finite_exactly_when_its_row_is(impl: str, dtype: str, value: float) -> None:
    rows: Any = np.ones((6, 129), np.float32)
    rows[1, 0], rows[3, 128] = value, value
    rows[4] = 65504 if dtype == "float16" else 3e38
    rows[5] = 0
    rows = (rows.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else rows.astype(dtype)
    with np.errstate(invalid="ignore"):
        norms = row_norms(rows, impl=impl)
    assert np.isfinite(norms).tolist() == [True, False, True, False, True, True]
    assert (norms == 0).tolist() == [False] * 5 + [True]


def test_rows_with_strides_and_read_only_rows() -> None:
    rows = np.arange(60, dtype=np.float32).reshape(6, 10)
    rows.flags.writeable = False
    for view in (rows, rows[::2], rows[:, 3:7], rows.T, rows[:0]):
        np.testing.assert_allclose(row_norms(view), np.linalg.norm(view.astype(np.float64), axis=1))


@pytest.mark.parametrize("rows", [np.zeros((2, 2)), np.zeros(2, np.float32), np.zeros((2, 2), np.int8)])
def test_other_rows_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="float16 or uint16, not"):
        row_norms(rows)
    with pytest.raises(ConfigError, match="impl must be one of"):
        row_norms(np.zeros((1, 1), np.float32), impl="triton")


def ignore_columns(values: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    out[:] = np.linalg.norm(values.astype(np.float64), axis=1)


def sum_in_float32(values: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        out[:] = np.sqrt(np.square(values.astype(np.float32)).sum(axis=1))


@pytest.mark.parametrize(
    ("mutation", "dtype"),
    [(ignore_columns, "int8"), (ignore_columns, "bfloat16"), (sum_in_float32, "float32")],
)
def test_mutations_are_caught(monkeypatch: pytest.MonkeyPatch, mutation: Any, dtype: str) -> None:
    monkeypatch.setattr(norms_numba, "norms_into", mutation)
    rows = stored(dtype, 5, 64, 0)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(row_norms(rows, impl="numba"), exact(rows), rtol=1e-12)
