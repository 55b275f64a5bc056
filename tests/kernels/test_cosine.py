"""The cosine kernels against a float64 computation, one row at a time."""

from __future__ import annotations

import errno
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

from pairtrace.errors import ConfigError, DirectionError
from pairtrace.kernels import cosine, cosine_product
from pairtrace.kernels.cosine import FUSED_DIRECTIONS, cosine_blocks, cosine_max, cosine_scores, prepare_directions
from pairtrace.kernels.cosine_inputs import HostRows
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from tests.kernels.rows import (
    DTYPES,
    FORMATS,
    TOLERANCE,
    assert_scores,
    awkward_rows,
    awkward_side,
    cancellation,
    expected_scores,
    stored,
)

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 127, 128, 129, 1023)


def _reversed(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows[::-1])[::-1]


def _row_strided(rows: np.ndarray) -> np.ndarray:
    wide = np.zeros((len(rows), rows.shape[1] + 5), rows.dtype)
    wide[:, 2:-3] = rows
    return wide[:, 2:-3]


def _column_strided(rows: np.ndarray) -> np.ndarray:
    return np.repeat(rows, 2, axis=1)[:, ::2]


def _read_only(rows: np.ndarray) -> np.ndarray:
    frozen = rows.copy()
    frozen.flags.writeable = False
    return frozen


def _unaligned(rows: np.ndarray) -> np.ndarray:
    buffer = np.zeros(rows.nbytes + 1, np.uint8)
    view = buffer[1:].view(rows.dtype).reshape(rows.shape)
    view[:] = rows
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "reversed": _reversed,
    "row-strided": _row_strided,
    "column-strided": _column_strided,
    "read-only": _read_only,
    "unaligned": _unaligned,
}


def _laid_out(layout: str, rows: Any) -> Any:
    if isinstance(rows, ScaledRows):
        return ScaledRows(LAYOUTS[layout](rows.values), rows.row_scale, rows.column_scale)
    return LAYOUTS[layout](rows)


@pytest.mark.parametrize("impl", ["numba", "reference"])
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    width=st.sampled_from(WIDTHS),
    directions=st.sampled_from([1, 2, 3, 4, 5, 9, FUSED_DIRECTIONS, FUSED_DIRECTIONS + 1, 40]),
    kind=st.sampled_from(FORMATS),
    two_sides=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    block_values=st.sampled_from([1, 50, 700, 1 << 20]),
)
@settings(deadline=None, max_examples=150)
def test_scores_equal_float64_for_any_format_shape_layout_and_block(
    impl: Any,
    seed: int,
    count: int,
    width: int,
    directions: int,
    kind: str,
    two_sides: bool,
    layout: str,
    block_values: int,
) -> None:
    rng = np.random.default_rng(seed)
    rows, keywords, values = awkward_side(rng, count, width, kind)
    times: Any = 1.0
    if two_sides:
        minus, _, minus_values = awkward_side(rng, count, width, kind)
        keywords = keywords | {"minus": _laid_out(layout, minus)}
        times = cancellation(values, minus_values) if kind == "int8" else 1.0
        with np.errstate(invalid="ignore"):
            values = values - minus_values
    rows = _laid_out(layout, rows)
    bank = rng.standard_normal((directions, width)).astype(np.float32)
    expected = expected_scores(values, bank)
    sizes = {"BLOCK_VALUES": block_values, "IN_PLACE_BLOCK_VALUES": block_values}
    with patch.multiple(cosine, **sizes), patch.object(cosine_product, "BLOCK_VALUES", block_values):
        scores = cosine_scores(rows, bank, impl=impl, **keywords)
        largest = cosine_max(rows, bank, impl=impl, **keywords)
        blocks = [(start, block.copy()) for start, block in cosine_blocks(rows, bank, impl=impl, **keywords)]
    assert_scores(scores, expected, times)
    assert_scores(largest[:, None], expected.max(axis=1, keepdims=True), times)
    assert [start for start, _ in blocks] == list(np.cumsum([0, *(len(block) for _, block in blocks)])[:-1])
    joined = np.concatenate([np.empty((0, directions), np.float32), *(block for _, block in blocks)])
    assert_scores(joined, expected, times)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("directions", [1, FUSED_DIRECTIONS, FUSED_DIRECTIONS + 1])
def test_compiled_scores_have_the_same_bits_in_any_block_layout_and_thread_count(
    kind: str, two_sides: bool, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cosine_product, "BLOCK_VALUES", 333 * 8)
    monkeypatch.setattr(cosine, "IN_PLACE_BLOCK_VALUES", directions * 17)
    rng = np.random.default_rng(1)
    rows, keywords, _ = awkward_side(rng, 50, 333, kind)
    minus = awkward_side(rng, 50, 333, kind)[0] if two_sides else None
    bank = prepare_directions(rng.standard_normal((directions, 333)))

    def score(part: slice, layout: str = "contiguous") -> np.ndarray:
        other = {} if minus is None else {"minus": _laid_out(layout, minus[part])}
        scores: np.ndarray = cosine_scores(_laid_out(layout, rows[part]), bank, impl="numba", **other, **keywords)
        return scores

    whole = score(slice(None))
    for layout in LAYOUTS:
        np.testing.assert_array_equal(score(slice(None), layout), whole)
    for part in (slice(0, 1), slice(1, 8), slice(8, 50)):
        if directions <= FUSED_DIRECTIONS:
            np.testing.assert_array_equal(score(part), whole[part])
        else:  # the last bits of a matrix product follow its shape
            np.testing.assert_allclose(score(part), whole[part], rtol=0, atol=TOLERANCE)
    for start, block in cosine_blocks(rows, bank, impl="numba", minus=minus, **keywords):
        np.testing.assert_array_equal(block, whole[start : start + len(block)])

    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        np.testing.assert_array_equal(score(slice(None)), whole)
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("directions", [1, 6, FUSED_DIRECTIONS + 1])
def test_equal_sides_have_no_cosine(kind: str, directions: int) -> None:
    rng = np.random.default_rng(11)
    rows, keywords, _ = awkward_side(rng, 9, 77, kind)
    bank = rng.standard_normal((directions, 77))
    for impl in ("numba", "reference"):
        assert np.isnan(cosine_scores(rows, bank, minus=rows, impl=impl, **keywords)).all()


@pytest.mark.parametrize("impl", ["numba", "reference"])
@pytest.mark.parametrize("directions", [1, 3, FUSED_DIRECTIONS + 1])
@pytest.mark.parametrize("two_sides", [False, True])
def test_given_norms_divide_scaled_rows(impl: Any, directions: int, two_sides: bool) -> None:
    rng = np.random.default_rng(12)
    rows, minus = (encode_int8(rng.standard_normal((7, 50)) * 10.0 ** rng.uniform(-3, 3)) for _ in range(2))
    values = rows.decode().astype(np.float64) - (minus.decode() if two_sides else 0.0)
    bank = rng.standard_normal((directions, 50))
    norms = 2 * np.linalg.norm(values, axis=1)
    norms[0] = np.nan
    expected = expected_scores(values, bank) / 2
    expected[0] = np.nan
    other = {"minus": minus} if two_sides else {}
    assert_scores(cosine_scores(rows, bank, impl=impl, norms=norms.astype(np.float32), **other), expected)


def test_many_directions_leave_the_threads_of_blas_as_they_were() -> None:
    controller = ThreadpoolController().select(user_api="blas")
    rng = np.random.default_rng(13)
    with controller.limit(limits=2):
        before = [library["num_threads"] for library in controller.info()]
        cosine_scores(rng.standard_normal((30, 8)).astype(np.float32), rng.standard_normal((FUSED_DIRECTIONS + 1, 8)))
        assert [library["num_threads"] for library in controller.info()] == before


def test_prepared_directions_are_those_given() -> None:
    rng = np.random.default_rng(14)
    rows = rng.standard_normal((5, 12)).astype(np.float32)
    bank = rng.standard_normal((3, 12))
    np.testing.assert_array_equal(cosine_scores(rows, prepare_directions(bank)), cosine_scores(rows, bank))
    with pytest.raises(DirectionError, match=r"width 12.*width 11"):
        cosine_scores(rows[:, :-1], prepare_directions(bank))


@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 13))
def test_every_float16_and_bfloat16_word_is_decoded(bits: int) -> None:
    words = np.arange(bits, bits + (1 << 13), dtype=np.uint16)
    formats: tuple[tuple[torch.dtype, Any], ...] = ((torch.float16, None), (torch.bfloat16, "bfloat16"))
    for dtype, row_dtype in formats:
        exact = torch.from_numpy(words).view(dtype).double().numpy()
        # A width of two makes the score depend on the magnitude of the word, not on its sign alone.
        pairs = np.stack([words, np.full_like(words, 0x3C00 if row_dtype is None else 0x3F80)], axis=1)
        rows = pairs.view(np.float16) if row_dtype is None else pairs
        with np.errstate(all="ignore"):
            expected = np.where(np.isfinite(exact), exact / np.hypot(exact, 1.0), np.nan)
        scores = cosine_scores(rows, np.array([1.0, 0.0]), impl="numba", row_dtype=row_dtype)
        assert_scores(scores, expected[:, None])


@pytest.mark.parametrize("directions", [1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_mapped_rows(tmp_path: Path, dtype: str, directions: int) -> None:
    rng = np.random.default_rng(2)
    rows, keywords, values = stored(awkward_rows(rng, 30, 65, dtype), dtype)
    path = tmp_path / "rows.bin"
    path.write_bytes(rows.tobytes())
    mapped = np.memmap(path, dtype=rows.dtype, mode="r", shape=rows.shape)
    bank = rng.standard_normal((directions, 65)).astype(np.float32)
    assert_scores(cosine_scores(mapped, bank, **keywords), expected_scores(values, bank))


@pytest.mark.parametrize("impl", ["auto", "numba", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_give_tensors(dtype: str, impl: Any) -> None:
    rng = np.random.default_rng(3)
    rows, keywords, values = stored(awkward_rows(rng, 30, 65, dtype), dtype)
    tensor = torch.from_numpy(rows).view(getattr(torch, dtype)) if keywords else torch.from_numpy(rows)
    bank = torch.from_numpy(rng.standard_normal((3, 65)).astype(np.float32))
    scores = cosine_scores(tensor, bank, impl=impl)
    assert isinstance(scores, torch.Tensor)
    assert_scores(scores.numpy(), expected_scores(values, bank.numpy()))
    largest = cosine_max(tensor.requires_grad_(), bank, impl=impl)
    assert_scores(largest.numpy(), expected_scores(values, bank.numpy()).max(axis=1))


@pytest.mark.parametrize("impl", ["numba", "reference"])
@pytest.mark.parametrize("directions", [1, 2, 20])
def test_given_norms_replace_the_norms_of_the_rows(impl: Any, directions: int) -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal((6, 40))
    values[4] *= 1e25
    bank = rng.standard_normal((directions, 40))
    norms = 1.5 * np.linalg.norm(values, axis=1)
    norms[:3] = 0.0, np.nan, np.inf
    expected = expected_scores(values, bank) / 1.5
    expected[:3] = np.nan
    scores = cosine_scores(values.astype(np.float32), bank, impl=impl, norms=norms.astype(np.float32))
    assert_scores(scores, expected)
    with pytest.raises(ConfigError, match=r"shape \(6,\).*\(5,\)"):
        cosine_scores(values.astype(np.float32), bank, impl=impl, norms=norms[:5].astype(np.float32))


def test_one_direction_may_be_a_vector_and_direction_scale_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((9, 12)).astype(np.float32)
    direction = rng.standard_normal(12)
    expected = expected_scores(rows.astype(np.float64), direction[None])
    for scale in (1e-300, 1e-40, 1.0, 1e40, 1e300):
        assert_scores(cosine_scores(rows, direction * scale), expected)
    assert_scores(cosine_scores(rows, -direction), -expected)


def _fresh_numba_module() -> Any:
    spec = importlib.util.find_spec("pairtrace.kernels.cosine_numba")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_fused(module: Any) -> np.ndarray:
    rows = module.Side.of(HostRows(np.arange(1, 13, dtype=np.float32).reshape(3, 4)))
    out = np.empty((3, 1), np.float32)
    module.fused_scores(rows, module.NO_SIDE, np.full(4, 0.5, np.float32), 4, None, out)
    return out


def test_kernels_run_where_no_cache_directory_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert_scores(_run_fused(_fresh_numba_module()), expected_scores(np.arange(1, 13.0).reshape(3, 4), np.ones((1, 4))))


def test_kernels_run_where_the_cache_fills_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    attempts: list[str] = []

    def full(cache_file: Any, key: Any, data: Any) -> None:
        attempts.append("write")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    scores = _run_fused(_fresh_numba_module())
    assert attempts == ["write"]
    assert_scores(scores, expected_scores(np.arange(1, 13.0).reshape(3, 4), np.ones((1, 4))))


def test_python_threads_may_score_at_once() -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((500, 64)).astype(np.float16)
    bank = rng.standard_normal((2, 64))
    expected = cosine_scores(rows, bank, impl="numba")
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(cosine_scores(rows, bank, impl="numba"), expected):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_cosine_max_never_holds_scores_beyond_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "IN_PLACE_BLOCK_VALUES", 64 * 100)
    monkeypatch.setattr(cosine_product, "BLOCK_VALUES", 64 * 30)
    sizes: list[int] = []
    real = cosine._numba_block

    def recording(*arguments: Any) -> None:
        real(*arguments)
        sizes.append(arguments[-1].size)

    monkeypatch.setattr(cosine, "_numba_block", recording)
    rng = np.random.default_rng(7)
    cosine_max(rng.standard_normal((1000, 8)).astype(np.float32), rng.standard_normal((64, 8)))
    assert max(sizes) == 64 * 90
    assert sum(sizes) == 1000 * 64
