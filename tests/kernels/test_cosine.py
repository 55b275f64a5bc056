"""The cosine kernels against a float64 computation, one row at a time."""

from __future__ import annotations

import errno
import importlib.util
import logging
import subprocess
import sys
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

from pairtrace.errors import ConfigError, DirectionError, MissingDependencyError
from pairtrace.kernels import cosine
from pairtrace.kernels.cosine import FUSED_DIRECTIONS, cosine_max, cosine_scores
from pairtrace.kernels.cosine_inputs import HostRows
from tests.kernels.rows import DTYPES, TOLERANCE, assert_scores, awkward_rows, expected_scores, stored

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 127, 128, 129, 1023)
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("impl", ["numba", "reference"])
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    width=st.sampled_from(WIDTHS),
    directions=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    block_values=st.sampled_from([1, 50, 700, 1 << 20]),
)
@settings(deadline=None, max_examples=120)
def test_scores_equal_float64_for_any_dtype_shape_layout_and_block(
    impl: Any, seed: int, count: int, width: int, directions: int, dtype: str, layout: str, block_values: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, keywords, values = stored(awkward_rows(rng, count, width, dtype), dtype)
    rows = LAYOUTS[layout](rows)
    bank = rng.standard_normal((directions, width)).astype(np.float32)
    expected = expected_scores(values, bank)
    with patch.multiple(cosine, BLOCK_VALUES=block_values, IN_PLACE_BLOCK_VALUES=block_values):
        scores = cosine_scores(rows, bank, impl=impl, **keywords)
        largest = cosine_max(rows, bank, impl=impl, **keywords)
    assert_scores(scores, expected)
    assert_scores(largest[:, None], expected.max(axis=1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [1, 3, FUSED_DIRECTIONS, FUSED_DIRECTIONS + 1, 40])
def test_compiled_scores_have_the_same_bits_in_any_block_layout_and_thread_count(dtype: str, directions: int) -> None:
    rng = np.random.default_rng(1)
    rows, keywords, _ = stored(awkward_rows(rng, 50, 333, dtype), dtype)
    bank = rng.standard_normal((directions, 333))
    whole = cosine_scores(rows, bank, impl="numba", **keywords)
    for layout in LAYOUTS.values():
        np.testing.assert_array_equal(cosine_scores(layout(rows), bank, impl="numba", **keywords), whole)
    for start, stop in [(0, 1), (1, 8), (8, 50)]:
        part = cosine_scores(rows[start:stop], bank, impl="numba", **keywords)
        if directions <= FUSED_DIRECTIONS:
            np.testing.assert_array_equal(part, whole[start:stop])
        else:  # the last bits of a matrix product follow its shape
            np.testing.assert_allclose(part, whole[start:stop], rtol=0, atol=TOLERANCE)

    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        np.testing.assert_array_equal(cosine_scores(rows, bank, impl="numba", **keywords), whole)
    finally:
        numba.set_num_threads(before)


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


@pytest.mark.parametrize("score", [cosine_scores, cosine_max])
@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (np.ones(7), "width 7.*width 8"),
        (np.ones((2, 9)), "width 9.*width 8"),
        (np.zeros(8), "direction 0 .* all its 8 values are 0"),
        (np.stack([np.ones(8), np.zeros(8)]), "direction 1 .* all its 8 values are 0"),
        (np.array([1, 1, np.nan, 1, 1, 1, 1, 1.0]), "direction 0 must be finite, but its value 2 is nan"),
        (np.stack([np.ones(8), np.full(8, -np.inf)]), "direction 1 must be finite, but its value 0 is -inf"),
        (np.ones((0, 8)), "at least one direction"),
        (np.ones((1, 1, 8)), r"shape \[D\] or \[K, D\]"),
    ],
)
@pytest.mark.parametrize("rows", [np.ones((3, 8), np.float32), np.ones((0, 8), np.float32), torch.ones(2, 8)])
def test_unusable_directions_are_refused(score: Any, directions: np.ndarray, message: str, rows: Any) -> None:
    with pytest.raises(DirectionError, match=message):
        score(rows, directions)


@pytest.mark.parametrize(
    ("rows", "keywords", "message"),
    [
        (np.ones((2, 4)), {}, "float64"),
        (np.ones((2, 4), ">f4"), {}, ">f4"),
        (np.ones((2, 4), np.uint16), {}, "row_dtype='bfloat16'"),
        (np.ones((2, 4), np.float16), {"row_dtype": "bfloat16"}, "uint16"),
        (np.ones((2, 4), np.float16), {"row_dtype": "float32"}, "float32"),
        (np.ones(4, np.float32), {}, r"\[N, D\]"),
        ([[1.0, 2.0, 3.0, 4.0]], {}, "list"),
        (torch.ones(2, 4, dtype=torch.float64), {}, "float64"),
        (np.ones((2, 4), np.float32), {"impl": "cuda"}, "'cuda'"),
        (np.ones((2, 4), np.float32), {"impl": "triton"}, "numpy array"),
        (torch.ones(2, 4, device="meta"), {"impl": "numba"}, "host memory"),
    ],
)
def test_unusable_rows_and_choices_are_refused(rows: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cosine_scores(rows, np.ones(4), **keywords)


def test_explicit_triton_raises_and_only_auto_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = torch.ones(2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pairtrace.kernels.cosine_triton", raising=False)
    monkeypatch.delattr("pairtrace.kernels.cosine_triton", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pairtrace\[gpu\]"):
        cosine_scores(rows, np.ones(4), impl="triton")

    monkeypatch.setitem(sys.modules, "pairtrace.kernels.cosine_numba", None)
    monkeypatch.delattr("pairtrace.kernels.cosine_numba", raising=False)
    monkeypatch.setattr(cosine, "_reported", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.allclose(cosine_scores(rows, np.ones(4)), torch.ones(2, 1))
    assert len(caplog.records) == 1
    with pytest.raises(ImportError):
        cosine_scores(rows, np.ones(4), impl="numba")


def test_triton_refuses_cpu_tensors_outside_the_interpreter() -> None:
    script = (
        "import torch\nfrom pairtrace.errors import ConfigError\nfrom pairtrace.kernels.cosine import cosine_scores\n"
        "try:\n    cosine_scores(torch.ones(2, 4), torch.ones(4), impl='triton')\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert "needs a CUDA tensor, but the rows are on cpu" in run.stdout


def test_importing_the_module_imports_neither_torch_nor_numba() -> None:
    script = "import sys, pairtrace.kernels.cosine; print(sorted({'torch', 'numba', 'triton'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


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
    sizes: list[int] = []
    real = cosine._numba_block

    def recording(*arguments: Any) -> None:
        real(*arguments)
        sizes.append(arguments[-1].size)

    monkeypatch.setattr(cosine, "_numba_block", recording)
    rng = np.random.default_rng(7)
    cosine_max(rng.standard_normal((1000, 8)).astype(np.float32), rng.standard_normal((64, 8)))
    assert max(sizes) <= 64 * 100
    assert sum(sizes) == 1000 * 64
