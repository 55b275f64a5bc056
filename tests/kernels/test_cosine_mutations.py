"""Mutations of the cosine kernels that their tests are known to catch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pairtrace.kernels.cosine import cosine_max, cosine_scores
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from tests.kernels.rows import TOLERANCE, assert_scores, expected_scores, stored

WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 33, 127, 128, 129, 1023)


# Silent mistakes that the checks above must catch: each takes the right scores, or the inputs, and spoils them.


def _plain_float32(rows: np.ndarray, bank: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        wide, units = rows.astype(np.float32), bank / np.linalg.norm(bank, axis=1, keepdims=True)
        scores: np.ndarray = (wide @ units.T / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return scores


def _float16_sums(rows: np.ndarray, bank: np.ndarray) -> np.ndarray:
    return cosine_scores(rows, bank).astype(np.float16).astype(np.float32)


SCORE_MUTATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "absolute cosine": lambda rows, bank: np.abs(cosine_scores(rows, bank)),
    "zero for rows without a cosine": lambda rows, bank: np.nan_to_num(cosine_scores(rows, bank)),
    "rows not normalized": lambda rows, bank: cosine_scores(rows, bank, norms=np.ones(len(rows), np.float32)),
    "directions not normalized": lambda rows, bank: (
        cosine_scores(rows, bank) * np.linalg.norm(bank, axis=1).astype(np.float32)
    ),
    "directions out of order": lambda rows, bank: cosine_scores(rows, np.roll(bank, 1, axis=0)),
    "rows shifted by one": lambda rows, bank: np.roll(cosine_scores(rows, bank), 1, axis=0),
    "last column left out": lambda rows, bank: cosine_scores(rows[:, :-1], bank[:, :-1]),
    "columns after the last whole vector left out": lambda rows, bank: cosine_scores(rows[:, :48], bank[:, :48]),
    "no guard for the float32 range": _plain_float32,
    "sums in half precision": _float16_sums,
}


def _check_fixed_workload(score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal((24, 60))
    values[0], values[1, 3], values[2, 4] = 0, np.nan, np.inf
    values[3] *= 1e30
    values[4] *= 1e-30
    rows = values.astype(np.float32)
    bank = rng.standard_normal((5, 60)).astype(np.float32)
    assert_scores(score(rows, bank), expected_scores(rows.astype(np.float64), bank))


def test_the_workload_for_mutations_passes_unspoiled() -> None:
    _check_fixed_workload(cosine_scores)


@pytest.mark.parametrize("mutation", sorted(SCORE_MUTATIONS))
def test_mutations_of_the_scores_are_caught(mutation: str) -> None:
    with pytest.raises(AssertionError):
        _check_fixed_workload(SCORE_MUTATIONS[mutation])


def _check_bank(best: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(9)
    bank = rng.standard_normal((3, 20)) + 4
    values = np.concatenate([rng.standard_normal((6, 20)), rng.standard_normal((6, 20)) - 4, np.zeros((1, 20))])
    rows = values.astype(np.float32)
    expected = expected_scores(rows.astype(np.float64), bank)
    assert (expected[6:12] < 0).all()
    assert_scores(best(rows, bank), expected.max(axis=1))


BANK_MUTATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "maximum starts at 0": lambda rows, bank: np.maximum(cosine_max(rows, bank), 0),
    "maximum ignores NaN": lambda rows, bank: np.fmax.reduce(cosine_scores(rows, bank), axis=1, initial=-1),
    "largest magnitude": lambda rows, bank: np.abs(cosine_scores(rows, bank)).max(axis=1),
    "mean over the bank": lambda rows, bank: cosine_scores(rows, bank).mean(axis=1),
    "zero padding takes part": lambda rows, bank: np.pad(cosine_scores(rows, bank), ((0, 0), (0, 1))).max(axis=1),
}


def test_bank_maximum_of_rows_against_every_direction_is_negative() -> None:
    _check_bank(cosine_max)
    _check_bank(lambda rows, bank: cosine_max(rows, bank, impl="reference"))


@pytest.mark.parametrize("mutation", sorted(BANK_MUTATIONS))
def test_mutations_of_the_bank_maximum_are_caught(mutation: str) -> None:
    with pytest.raises(AssertionError):
        _check_bank(BANK_MUTATIONS[mutation])


def test_bfloat16_words_read_as_float16_are_caught() -> None:
    rng = np.random.default_rng(10)
    words, _, values = stored(rng.standard_normal((8, 30)), "bfloat16")
    bank = rng.standard_normal((2, 30))
    assert np.nanmax(np.abs(cosine_scores(words.view(np.float16), bank) - expected_scores(values, bank))) > TOLERANCE


# Two sides, each with its own row and column scales.
def _scaled_pair() -> tuple[ScaledRows, ScaledRows]:
    rng = np.random.default_rng(11)
    columns = 10.0 ** rng.uniform(-1, 1, 60)
    chosen, rejected = (encode_int8(rng.standard_normal((12, 60)) * columns[:: 1 - 2 * side]) for side in range(2))
    return chosen, rejected


def _check_pair(score: Callable[[ScaledRows, ScaledRows, np.ndarray], np.ndarray]) -> None:
    chosen, rejected = _scaled_pair()
    bank = np.random.default_rng(12).standard_normal((3, 60))
    values = chosen.decode().astype(np.float64) - rejected.decode()
    assert_scores(score(chosen, rejected, bank), expected_scores(values, bank))


def _with(rows: ScaledRows, row_scale: np.ndarray | None = None, column_scale: np.ndarray | None = None) -> ScaledRows:
    return ScaledRows(
        rows.values,
        rows.row_scale if row_scale is None else row_scale,
        rows.column_scale if column_scale is None else column_scale,
    )


def _norms_of(rows: ScaledRows) -> np.ndarray:
    return np.linalg.norm(rows.decode(), axis=1)


PAIR_MUTATIONS: dict[str, Callable[[ScaledRows, ScaledRows, np.ndarray], np.ndarray]] = {
    "rejected side left out": lambda a, b, bank: cosine_scores(a, bank),
    "sides swapped": lambda a, b, bank: cosine_scores(b, bank, minus=a),
    "difference of the cosines": lambda a, b, bank: cosine_scores(a, bank) - cosine_scores(b, bank),
    "norm of the chosen side": lambda a, b, bank: cosine_scores(a, bank, minus=b, norms=_norms_of(a)),
    "norm of the rejected side": lambda a, b, bank: cosine_scores(a, bank, minus=b, norms=_norms_of(b)),
    "column scales of the other side": lambda a, b, bank: cosine_scores(
        a, bank, minus=_with(b, column_scale=a.column_scale)
    ),
    "no column scales": lambda a, b, bank: cosine_scores(
        *(_with(a, column_scale=np.ones(60, np.float32)), bank), minus=_with(b, column_scale=np.ones(60, np.float32))
    ),
    "row scales of the other side": lambda a, b, bank: cosine_scores(a, bank, minus=_with(b, row_scale=a.row_scale)),
    "no row scales": lambda a, b, bank: cosine_scores(
        *(_with(a, row_scale=np.ones(12, np.float32)), bank), minus=_with(b, row_scale=np.ones(12, np.float32))
    ),
    "sides rounded to int8 after subtraction": lambda a, b, bank: cosine_scores(
        encode_int8(a.decode() - b.decode()), bank
    ),
}


def test_the_pair_for_mutations_passes_unspoiled() -> None:
    _check_pair(lambda a, b, bank: cosine_scores(a, bank, minus=b))
    _check_pair(lambda a, b, bank: cosine_scores(a, bank, minus=b, impl="reference"))


@pytest.mark.parametrize("mutation", sorted(PAIR_MUTATIONS))
def test_mutations_of_two_scaled_sides_are_caught(mutation: str) -> None:
    with pytest.raises(AssertionError):
        _check_pair(PAIR_MUTATIONS[mutation])
