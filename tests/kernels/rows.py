"""Awkward rows for the kernel tests, and the cosine computed a second way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pairtrace.kernels.int8 import ScaledRows

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = (*DTYPES, "int8")
# Largest and smallest positive finite value.
EXTREMES = {
    "float32": (3.4028235e38, 1.401298464324817e-45),
    "float16": (65504.0, 5.960464477539063e-08),
    "bfloat16": (3.3895313892515355e38, 9.183549615799121e-41),
}
# float32 accumulation over up to about a thousand products, whatever the row dtype: its values are exact.
TOLERANCE = 1e-6


def stored(values: np.ndarray, dtype: str) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """Rows in `dtype`, the keyword arguments they need, and the float64 values they hold. torch does the rounding."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    exact = rounded.double().numpy()
    if dtype == "bfloat16":
        return rounded.view(torch.uint16).numpy(), {"row_dtype": "bfloat16"}, exact
    return rounded.numpy(), {}, exact


def awkward_rows(rng: np.random.Generator, count: int, width: int, dtype: str) -> np.ndarray:
    """Float64 [count, width]: ordinary rows of many magnitudes, and in places rows at the edges of `dtype`."""
    largest, smallest = EXTREMES[dtype]
    values = rng.standard_normal((count, width))
    values *= 10.0 ** rng.integers(-3, 3, size=(count, 1))
    signs = rng.choice([-1.0, 1.0], size=(count, width))
    for i in range(count):
        match int(rng.integers(0, 16)):
            case 0:
                values[i] = 0.0
            case 1:
                values[i, rng.integers(width)] = np.nan
            case 2:
                values[i, rng.integers(width)] = rng.choice([np.inf, -np.inf])
            case 3:
                values[i] = largest * signs[i]
            case 4:
                values[i] = smallest * signs[i]
            case 5:
                values[i] = np.where(rng.random(width) < 0.5, largest, smallest) * signs[i]
            case 6:
                values[i] *= largest / 1e6
            case 7:
                values[i] = 0.0
                values[i, rng.integers(width)] = smallest
            case 8 if dtype != "float16":
                values[i] *= 1e-21  # squares are denormal in float32
            case 9 if dtype != "float16":
                values[i] *= 1e21  # squares overflow in float32
    return values


def awkward_scaled_rows(rng: np.random.Generator, count: int, width: int) -> tuple[ScaledRows, np.ndarray]:
    """Scaled int8 rows with scales of many magnitudes, unusable ones among them, and their float64 values."""
    values = rng.integers(-127, 128, (count, width)).astype(np.int8)
    row_scale = 10.0 ** rng.uniform(-3, 3, count)
    for i in range(count):
        match int(rng.integers(0, 12)):
            case 0:  # as such rows are encoded: under a larger scale the other side of a difference would vanish
                values[i], row_scale[i] = 0, 0
            case 1:
                row_scale[i] = rng.choice([0.0, np.nan, np.inf])
            case 2:
                row_scale[i] = rng.choice([1e-44, 1e-38, 1e38])
    column_scale = 10.0 ** rng.uniform(-3, 3, width)
    rows = ScaledRows(values, row_scale.astype(np.float32), column_scale.astype(np.float32))
    with np.errstate(invalid="ignore"):  # infinity times 0
        exact = values * rows.row_scale.astype(np.float64)[:, None] * rows.column_scale.astype(np.float64)
    return rows, exact


def awkward_side(rng: np.random.Generator, count: int, width: int, kind: str) -> tuple[Any, dict[str, Any], np.ndarray]:
    """Rows of one of `FORMATS`, the keyword arguments they need, and the float64 values they hold."""
    if kind == "int8":
        rows, exact = awkward_scaled_rows(rng, count, width)
        return rows, {}, exact
    return stored(awkward_rows(rng, count, width, kind), kind)


def expected_scores(values: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Float64 [N, K] cosines of float64 rows, one row at a time, NaN where there is none."""
    expected = np.full((len(values), len(directions)), np.nan)
    for i, row in enumerate(values):
        if np.isfinite(row).all() and row.any():
            for k, direction in enumerate(directions.astype(np.float64)):
                v, b = row / np.abs(row).max(), direction / np.abs(direction).max()
                expected[i, k] = np.dot(v, b) / (np.linalg.norm(v) * np.linalg.norm(b))
    return expected


def cancellation(values: np.ndarray, minus: np.ndarray) -> np.ndarray:
    """How many times larger two sides are than their difference, [N, 1], at least 1.

    int8 values are products of scales, rounded to float32 before the subtraction: their errors grow by this.
    """
    with np.errstate(all="ignore"):
        sides = np.abs(values).max(axis=1) + np.abs(minus).max(axis=1)
        times = sides / np.abs(values - minus).max(axis=1)
    return np.where(np.isfinite(times), np.maximum(times, 1), 1)[:, None]


def assert_scores(actual: np.ndarray, expected: np.ndarray, times: np.ndarray | float = 1.0) -> None:
    """Same NaN, same values within `TOLERANCE` times what `cancellation` gives, and no cosine beyond 1."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    excess = np.abs(actual - expected) - TOLERANCE * times
    assert not (excess > 0).any(), f"scores differ by up to {np.nanmax(excess)} more than they may"
    assert not (np.abs(actual) > 1 + TOLERANCE * times).any()
