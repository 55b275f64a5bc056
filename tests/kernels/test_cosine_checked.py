from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels import checksum_numba, cosine_checked_numba
from pairtrace.kernels.cosine import cosine_scores
from pairtrace.kernels.cosine_checked import cosine_scores_and_checksum
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from tests.kernels.rows import DTYPES, awkward_rows, awkward_scaled_rows, stored


def chunk_of(rows: np.ndarray, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows at the beginning of a chunk's bytes, and these bytes; what follows is not zero."""
    body = np.full(rows.nbytes + padding, 0xA5, np.uint8)
    body[: rows.nbytes] = rows.reshape(-1).view(np.uint8)
    return body[: rows.nbytes].view(rows.dtype).reshape(rows.shape), body


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 300),
    width=st.sampled_from([1, 7, 33, 129, 1023, 4096]),
    directions=st.sampled_from([1, 2, 4, 5, 33]),
    padding=st.sampled_from([0, 1, 8, 1000, 70_000]),
    task_bytes=st.sampled_from([1, 5000, 1 << 16, 1 << 18]),
)
@settings(max_examples=60, deadline=None)
def test_scores_and_checksum_are_those_of_two_passes(
    seed: int, dtype: str, count: int, width: int, directions: int, padding: int, task_bytes: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, options, _ = stored(awkward_rows(rng, count, width, dtype), dtype)
    rows, body = chunk_of(rows, padding)
    bank = rng.standard_normal((directions, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine_checked_numba, "_TASK_BYTES", task_bytes)
        patch.setattr("pairtrace.kernels.cosine_checked.SMALL_BYTES", 1)
        scores, checksum = cosine_scores_and_checksum(rows, bank, body, **options)
    np.testing.assert_array_equal(scores, cosine_scores(rows, bank, **options))
    assert checksum == google_crc32c.value(body.tobytes())


def test_scaled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairtrace.kernels.cosine_checked.SMALL_BYTES", 1)
    rng = np.random.default_rng(0)
    rows, _ = awkward_scaled_rows(rng, 301, 129)
    values, body = chunk_of(rows.values, 40)
    held = ScaledRows(values, rows.row_scale, rows.column_scale)
    bank = rng.standard_normal((3, 129))
    scores, checksum = cosine_scores_and_checksum(held, bank, body)
    np.testing.assert_array_equal(scores, cosine_scores(rows, bank))
    assert checksum == google_crc32c.value(body.tobytes())


def test_a_flipped_bit_anywhere_changes_the_checksum() -> None:
    rng = np.random.default_rng(1)
    rows, body = chunk_of(rng.standard_normal((200, 300)).astype(np.float16), 64)
    bank = rng.standard_normal(300)
    right = cosine_scores_and_checksum(rows, bank, body)[1]
    for place in [0, len(body) // 3, len(body) - 1, *rng.integers(0, len(body), 60).tolist()]:
        bit = np.uint8(1 << int(rng.integers(8)))
        body[place] ^= bit
        assert cosine_scores_and_checksum(rows, bank, body)[1] != right
        body[place] ^= bit
    assert cosine_scores_and_checksum(rows, bank, body)[1] == right


@pytest.mark.parametrize("case", ["strided", "elsewhere", "reference", "without the instruction"])
def test_what_cannot_be_read_together_is_read_twice(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows, body = chunk_of(rng.standard_normal((400, 100)).astype(np.float32), 0)
    options: dict[str, Any] = {}
    bank = rng.standard_normal((2, 100))
    if case == "strided":
        rows = rows[::2]
    elif case == "elsewhere":
        rows = rows.copy()
    elif case == "reference":
        options = {"impl": "reference"}
    else:
        monkeypatch.setattr(checksum_numba, "instruction_available", lambda: False)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the rows are not those of the bytes")

    monkeypatch.setattr(cosine_checked_numba, "scores_and_checksum", refuse)
    scores, checksum = cosine_scores_and_checksum(rows, bank, body, **options)
    np.testing.assert_array_equal(scores, cosine_scores(rows, bank, **options))
    assert checksum == google_crc32c.value(body.tobytes())


def test_bytes_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="contiguous uint8"):
        cosine_scores_and_checksum(np.ones((2, 3), np.float32), np.ones(3), np.zeros(6, np.float32))


def test_given_norms_of_int8_rows_leave_out_the_squares_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short kernel gives the scores of the general one, rows that it must leave to that one included."""
    from pairtrace.kernels import cosine_numba

    rng = np.random.default_rng(3)
    rows = encode_int8(rng.standard_normal((203, 77)) * 10.0 ** rng.uniform(-3, 3, (203, 1)))
    values, row_scale = rows.values.copy(), rows.row_scale.copy()
    values[7] = 0
    row_scale[[9, 10]] = 0.0, np.nan
    rows = ScaledRows(values, row_scale, rows.column_scale * np.float32(1e-30))
    norms = np.linalg.norm(rows.decode().astype(np.float64), axis=1).astype(np.float32) * 2
    norms[20:23] = 0.0, np.nan, np.inf
    for count in (1, 3, 4, 9):
        bank = rng.standard_normal((count, 77))
        short = cosine_scores(rows, bank, norms=norms)
        reference = cosine_scores(rows, bank, norms=norms, impl="reference")
        np.testing.assert_array_equal(np.isnan(short), np.isnan(reference))
        assert np.isnan(short[[7, 9, 10, 20, 21, 22]]).all()
        np.testing.assert_allclose(short, reference, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(cosine_numba, "np", _FormatsWithoutInt8())
        general = cosine_scores(rows, bank, norms=norms)
    np.testing.assert_allclose(short, general, atol=1e-6)


class _FormatsWithoutInt8:
    """numpy under which no words are int8, so that the general kernel runs."""

    int8 = None

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
