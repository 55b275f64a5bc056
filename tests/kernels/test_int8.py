"""Rows as scaled int8 against float64 arithmetic, and how well cosines survive them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from pairtrace.errors import ConfigError
from pairtrace.kernels import int8
from pairtrace.kernels.int8 import LARGEST, ScaledRows, encode_int8


def like_activations(count: int, width: int, *, heavy: bool = False, seed: int = 0) -> np.ndarray:
    """float16 rows with what makes residual streams hard: four dimensions 100 times the rest, columns of different
    spread and mean, and norms that vary thirtyfold; `heavy` for columns with outliers of their own."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, (count, width)) if heavy else rng.standard_normal((count, width))
    spread = np.exp(0.5 * rng.standard_normal(width))
    spread[rng.choice(width, 4, replace=False)] *= 100
    rows = values * spread + 0.3 * spread * rng.standard_normal(width)
    norms = np.exp(rng.uniform(0, np.log(30), (count, 1)))
    return (3 * rows * norms / np.linalg.norm(spread)).astype(np.float16)


def expected_column_scale(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    units = wide[norms > 0] / norms[norms > 0, None]
    scale: np.ndarray = np.mean(units**8, axis=0) ** (1 / 8) if len(units) else np.zeros(rows.shape[1])
    return np.where(scale > 1e-20, scale, 1.0)


def assert_nearest(rows: np.ndarray, encoded: ScaledRows) -> None:
    """Every value is within half a step of the row's, the largest of each row uses all steps, and norms are kept."""
    wide = rows.astype(np.float64)
    columns = encoded.column_scale.astype(np.float64)
    steps = np.abs(wide / columns).max(axis=1, initial=0)[:, None] / LARGEST * columns
    errors = np.abs(encoded.values * steps - wide)
    assert (errors <= steps * 0.5001).all()
    decoded = encoded.values * encoded.row_scale.astype(np.float64)[:, None] * columns
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), np.linalg.norm(wide, axis=1), rtol=1e-6)
    filled = np.abs(wide).max(axis=1, initial=0) > 0
    assert (np.abs(encoded.values[filled].astype(int)).max(axis=1) == LARGEST).all()
    assert not encoded.values[~filled].any()
    np.testing.assert_array_equal(encoded.row_scale > 0, filled)


@given(
    count=st.integers(0, 60),
    width=st.integers(1, 300),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    layout=st.sampled_from(["contiguous", "every second row", "every second column", "read-only"]),
    block=st.sampled_from([1, 100, 1 << 18]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=80)
def test_rounds_to_the_nearest_step_for_any_shape_layout_and_block(
    count: int, width: int, dtype: str, layout: str, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((count, width)) * np.exp(rng.uniform(-5, 5, (count, 1)))).astype(dtype)
    rows *= rng.random((count, width)) > 0.2
    rows[rng.random(count) < 0.1] = 0
    if layout == "every second row":
        rows = np.repeat(rows, 2, axis=0)[::2]
    elif layout == "every second column":
        rows = np.repeat(rows, 2, axis=1)[:, ::2]
    elif layout == "read-only":
        rows.flags.writeable = False
    with patch.object(int8, "_BLOCK_VALUES", block):
        encoded = encode_int8(rows)
    assert encoded.values.dtype == np.int8
    np.testing.assert_allclose(encoded.column_scale, expected_column_scale(rows), rtol=1e-6)
    assert_nearest(rows, encoded)
    whole = encode_int8(rows)
    for name in ("values", "row_scale", "column_scale"):
        np.testing.assert_array_equal(getattr(encoded, name), getattr(whole, name))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    rows = like_activations(300, 1024)
    before = numba.get_num_threads()
    encoded = []
    try:
        for threads in (1, before):
            numba.set_num_threads(threads)
            encoded.append(encode_int8(rows))
    finally:
        numba.set_num_threads(before)
    for name in ("values", "row_scale", "column_scale"):
        np.testing.assert_array_equal(getattr(encoded[0], name), getattr(encoded[1], name))


@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_rows_at_the_ends_of_the_float32_range_keep_their_direction(magnitude: float) -> None:
    rng = np.random.default_rng(1)
    rows = rng.uniform(-1, 1, (20, 50)).astype(np.float32)
    scaled = (rows * np.float32(magnitude)).astype(np.float32)
    mixed = np.concatenate([scaled, rows])
    encoded = encode_int8(mixed)
    assert (encoded.row_scale > 0).all()
    assert np.isfinite(encoded.row_scale).all()
    decoded = encoded.values * encoded.column_scale.astype(np.float64)
    wide = mixed.astype(np.float64)
    cosines = (decoded * wide).sum(axis=1) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(wide, axis=1)
    assert (cosines > 0.9999).all()


def test_float16_denormals_are_no_zeros() -> None:
    rows = np.array([[2**-24, -(2**-24), 0], [1, 2, 3]], np.float16)
    encoded = encode_int8(rows)
    np.testing.assert_array_equal(encoded.values[0, :2] != 0, [True, True])
    np.testing.assert_allclose(encoded.decode()[0], rows[0].astype(np.float32), rtol=0.005)


def _spearman(rows: np.ndarray, decoded: np.ndarray, directions: np.ndarray) -> list[float]:
    return [float(spearmanr(*pair).statistic) for pair in _score_pairs(rows, decoded, directions)]


def _score_pairs(rows: np.ndarray, decoded: np.ndarray, directions: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    scores = []
    for values in (rows, decoded):
        wide = values.astype(np.float64)
        scores.append(wide @ directions.T / np.linalg.norm(wide, axis=1, keepdims=True))
    return list(zip(scores[0].T, scores[1].T, strict=True))


def _overlap(rows: np.ndarray, decoded: np.ndarray, directions: np.ndarray) -> float:
    """Share of the top 1 % that both agree on, over all directions."""
    k = len(rows) // 100
    shared = [
        len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k for a, b in _score_pairs(rows, decoded, directions)
    ]
    return float(np.mean(shared))


def _directions(rows: np.ndarray) -> np.ndarray:
    """Random ones, and means of rows as behaviour vectors are."""
    wide = rows.astype(np.float64)
    chosen = [wide.mean(axis=0), wide[:200].mean(axis=0), wide[-100:].mean(axis=0)]
    return np.concatenate([np.random.default_rng(2).standard_normal((12, rows.shape[1])), chosen])


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("count", "width"), [(6000, 64), (4000, 1024), (2000, 4096)])
def test_cosines_keep_their_ranks(count: int, width: int, heavy: bool) -> None:
    rows = like_activations(count, width, heavy=heavy)
    decoded = encode_int8(rows).decode()
    directions = _directions(rows)
    assert min(_spearman(rows, decoded, directions)) >= 0.9995
    assert _overlap(rows, decoded, directions) >= 0.98


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_that_are_not_finite_are_refused_with_their_row(value: float, dtype: str) -> None:
    rows = np.ones((700, 500), dtype)
    rows[650, 3] = value
    with pytest.raises(ConfigError, match="row 650 must be finite"):
        encode_int8(rows)


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(ConfigError, match="row 1 must be finite"):
        encode_int8(np.array([[1.0, 2.0], [1e300, 0.0]]))


@pytest.mark.parametrize("rows", [np.ones((2, 2), np.uint16), np.ones(3, np.float32)])
def test_other_rows_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="floating-point"):
        encode_int8(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.zeros((2, 3), np.int16)}, "int8 .N, D., not int16"),
        ({"row_scale": np.zeros(3, np.float32)}, "row_scale must be float32"),
        ({"column_scale": np.ones(3)}, "column_scale must be float32"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(arguments: dict[str, Any], message: str) -> None:
    right = {
        "values": np.zeros((2, 3), np.int8),
        "row_scale": np.zeros(2, np.float32),
        "column_scale": np.ones(3, np.float32),
    }
    with pytest.raises(ConfigError, match=message):
        ScaledRows(**(right | arguments))


def test_slices_and_selections_decode_to_the_same_rows() -> None:
    encoded = encode_int8(like_activations(30, 16))
    chosen = np.array([4, 2, 9])
    assert len(encoded) == 30
    assert encoded.shape == (30, 16)
    np.testing.assert_array_equal(encoded[5:9].decode(), encoded.decode()[5:9])
    np.testing.assert_array_equal(encoded[chosen].decode(), encoded.decode()[chosen])
    assert np.shares_memory(encoded[5:9].values, encoded.values)


def _by_scales(rows: np.ndarray, columns: np.ndarray, rounding: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    relative = rows.astype(np.float64) / columns
    scale = np.abs(relative).max(axis=1, keepdims=True) / LARGEST
    return rounding(relative / scale) * scale * columns


# Silent mistakes in the encoding that the check of the ranks must catch.
MUTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "no scales of columns": lambda rows: _by_scales(rows, np.ones(rows.shape[1]), np.rint),
    "column scales shifted by one": lambda rows: (
        encode_int8(rows).values * np.roll(expected_column_scale(rows), 1).astype(np.float32)
    ),
    "towards zero": lambda rows: _by_scales(rows, expected_column_scale(rows), lambda steps: np.trunc(steps / 8) * 8),
    "saturated": lambda rows: _by_scales(rows, expected_column_scale(rows), lambda steps: np.clip(steps, -32, 32)),
    "scales of other rows' order": lambda rows: encode_int8(rows).decode()[::-1],
}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_mutations_are_caught(mutation: str) -> None:
    rows = like_activations(4000, 1024)
    assert min(_spearman(rows, MUTATIONS[mutation](rows), _directions(rows))) < 0.9995
