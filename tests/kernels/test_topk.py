"""The streaming top-k against a full stable sort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels import topk
from pairtrace.kernels.topk import StreamingTopK

Result = tuple[np.ndarray, np.ndarray]


def full_sort(scores: np.ndarray, first_row: int, k: int, largest: bool) -> Result:
    """Python's stable sort over (score, row) pairs."""
    pairs = [(float(score), first_row + i) for i, score in enumerate(scores) if not np.isnan(score)]
    pairs.sort(key=lambda pair: (-pair[0] if largest else pair[0], pair[1]))
    chosen = pairs[:k]
    return np.array([s for s, _ in chosen], np.float32), np.array([r for _, r in chosen], np.int64)


def assert_same(actual: Result, expected: Result) -> None:
    assert actual[0].dtype == np.float32
    assert actual[1].dtype == np.int64
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[0], expected[0])


@given(
    count=st.integers(0, 400),
    k=st.one_of(st.integers(1, 20), st.integers(1, 450)),
    largest=st.booleans(),
    block=st.integers(1, 50),
    first_row=st.integers(0, 2**40),
    slack=st.sampled_from([1, 7, 1 << 16]),
    seed=st.integers(0, 2**32 - 1),
    tensors=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_equals_a_full_stable_sort_for_any_blocks_in_any_order(
    count: int,
    k: int,
    largest: bool,
    block: int,
    first_row: int,
    slack: int,
    seed: int,
    tensors: bool,
) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values: ties everywhere.
    values = rng.choice(np.array([-1, -0.5, -0.0, 0.0, 0.5, 1, np.nan, np.inf, -np.inf], np.float32), count)
    starts = rng.permutation(np.arange(0, len(values), block))
    best = StreamingTopK(k, largest=largest)
    with patch.object(topk, "_SLACK", slack):
        for start in starts:
            part = values[start : start + block]
            best.update(torch.from_numpy(part) if tensors else part, int(start) + first_row)
        result = best.result()
    assert_same(result, full_sort(values, first_row, k, largest))
    assert_same(best.result(), result)
    assert best.seen == len(values)
    assert best.nan_count == int(np.isnan(values).sum())


@pytest.mark.parametrize("largest", [True, False])
def test_a_tie_with_the_worst_kept_score_goes_to_the_lower_row_even_when_it_comes_late(largest: bool) -> None:
    best = StreamingTopK(2, largest=largest)
    best.update(np.ones(4, np.float32), 10)
    np.testing.assert_array_equal(best.result()[1], [10, 11])
    best.update(np.ones(1, np.float32), 3)
    np.testing.assert_array_equal(best.result()[1], [3, 10])


def test_updates_may_follow_a_result() -> None:
    values = np.random.default_rng(0).integers(0, 20, 500).astype(np.float32)
    best = StreamingTopK(40)
    for start in range(0, 500, 50):
        best.update(values[start : start + 50], start)
        assert_same(best.result(), full_sort(values[: start + 50], 0, 40, True))


def test_the_caller_may_change_what_it_gave_and_got() -> None:
    values = np.array([3.0, 1.0, 2.0], np.float32)
    best = StreamingTopK(2)
    best.update(values, 0)
    values[:] = 9
    best.result()[0][:] = 7
    assert_same(best.result(), (np.array([3.0, 2.0], np.float32), np.array([0, 2], np.int64)))


def test_memory_stays_bounded() -> None:
    best = StreamingTopK(10)
    with patch.object(topk, "_SLACK", 100):
        for start in range(0, 100_000, 500):
            best.update(np.ones(500, np.float32), start)  # all tied: nothing can be refused by its score
            assert sum(map(len, best._rows)) <= 10 + 100 + 500
    np.testing.assert_array_equal(best.result()[1], np.arange(10))


def test_nothing_offered() -> None:
    scores, rows = StreamingTopK(3).result()
    assert scores.shape == rows.shape == (0,)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1, not {k}"):
        StreamingTopK(k)


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((3, 1), np.float32), torch.ones(3).half()])
def test_other_scores_are_refused(scores: Any) -> None:
    with pytest.raises(ConfigError, match="float32"):
        StreamingTopK(2).update(scores, 0)


def _unstable(values: np.ndarray, k: int) -> Result:
    order = np.argsort(values)[::-1][:k]
    return values[order], order


def _nan_first(values: np.ndarray, k: int) -> Result:
    order = np.argsort(-np.nan_to_num(values, nan=np.inf), kind="stable")[:k]
    return values[order], order


def _magnitude(values: np.ndarray, k: int) -> Result:
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return values[order], order


def _late_ties_lost(values: np.ndarray, k: int) -> Result:
    """A stream that refuses scores equal to its worst, fed from the last block to the first."""
    rows = np.empty(0, np.int64)
    for start in reversed(range(0, len(values), 10)):
        offered = np.arange(start, min(start + 10, len(values)))
        offered = offered[~np.isnan(values[offered])]
        if len(rows) == k:
            offered = offered[values[offered] > values[rows].min()]
        rows = np.concatenate([rows, offered])
        rows = rows[np.lexsort((rows, -values[rows]))][:k]
    return values[rows], rows


@pytest.mark.parametrize("mutant", [_unstable, _nan_first, _magnitude, _late_ties_lost])
def test_mutations_are_caught(mutant: Callable[[np.ndarray, int], Result]) -> None:
    values = np.random.default_rng(1).integers(-4, 4, 100).astype(np.float32)
    values[37] = np.nan
    best = StreamingTopK(20)
    best.update(values, 0)
    assert_same(best.result(), full_sort(values, 0, 20, True))
    with pytest.raises(AssertionError):
        assert_same(mutant(values, 20), full_sort(values, 0, 20, True))
