"""The streaming top-k against a full stable sort."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels.topk import StreamingTopK

Result = tuple[np.ndarray, np.ndarray]

# Few distinct values: ties everywhere.
VALUES = np.array([-1, -0.5, -0.0, 0.0, 0.5, 1, np.nan, np.inf, -np.inf], np.float32)


def full_sort(scores: np.ndarray, first_row: int, k: int, largest: bool) -> Result:
    """Python's stable sort over the (score, row) pairs of one direction."""
    pairs = [(float(score), first_row + i) for i, score in enumerate(scores) if not np.isnan(score)]
    pairs.sort(key=lambda pair: (-pair[0] if largest else pair[0], pair[1]))
    chosen = pairs[:k]
    return np.array([s for s, _ in chosen], np.float32), np.array([r for _, r in chosen], np.int64)


def full_sorts(scores: np.ndarray, first_row: int, k: int, largest: bool) -> Result:
    """`full_sort` of every column, padded as the stream pads."""
    results = [full_sort(column, first_row, k, largest) for column in scores.T]
    longest = max(len(rows) for _, rows in results)
    padded = np.full((len(results), longest), np.nan, np.float32), np.full((len(results), longest), -1, np.int64)
    for direction, (best, rows) in enumerate(results):
        padded[0][direction, : len(rows)] = best
        padded[1][direction, : len(rows)] = rows
    return padded


def assert_same(actual: Result, expected: Result) -> None:
    assert actual[0].dtype == np.float32
    assert actual[1].dtype == np.int64
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[0], expected[0])


@given(
    count=st.integers(0, 300),
    directions=st.one_of(st.integers(1, 5), st.sampled_from([63, 64, 65, 130])),
    k=st.one_of(st.integers(1, 20), st.integers(1, 350)),
    largest=st.booleans(),
    block=st.integers(1, 70),
    first_row=st.integers(0, 2**40),
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
    tensors=st.booleans(),
    streams=st.integers(1, 3),
)
@settings(deadline=None, max_examples=120)
def test_equals_a_full_stable_sort_for_any_blocks_in_any_order_and_any_merging(
    count: int,
    directions: int,
    k: int,
    largest: bool,
    block: int,
    first_row: int,
    seed: int,
    tied: bool,
    tensors: bool,
    streams: int,
) -> None:
    rng = np.random.default_rng(seed)
    shape = (count, directions)
    values = rng.choice(VALUES, shape) if tied else rng.standard_normal(shape).astype(np.float32)
    best = [StreamingTopK(k, directions, largest) for _ in range(streams)]
    for start in rng.permutation(np.arange(0, count, block)):
        part = values[start : start + block]
        best[rng.integers(streams)].update(torch.from_numpy(part) if tensors else part, int(start) + first_row)
    for other in best[1:]:
        best[0].merge(other)
    result = best[0].result()
    assert_same(result, full_sorts(values, first_row, k, largest))
    assert_same(best[0].result(), result)
    assert best[0].seen == count
    np.testing.assert_array_equal(best[0].nan_count, np.isnan(values).sum(axis=0))


def test_thousands_of_directions_equal_a_full_sort() -> None:
    values = np.random.default_rng(3).standard_normal((400, 4096)).astype(np.float32)
    best = StreamingTopK(3, 4096)
    for start in range(0, 400, 150):
        best.update(values[start : start + 150], start)
    rows = np.argsort(-values, axis=0, kind="stable")[:3].T
    assert_same(best.result(), (np.take_along_axis(values.T, rows, axis=1), rows))


def test_strided_blocks_are_read_right() -> None:
    values = np.random.default_rng(4).standard_normal((90, 14)).astype(np.float32)
    best = StreamingTopK(5, 7)
    best.update(values[::3, ::2], 0)
    assert_same(best.result(), full_sorts(values[::3, ::2], 0, 5, True))


@pytest.mark.parametrize("largest", [True, False])
def test_a_tie_with_the_worst_kept_score_goes_to_the_lower_row_even_when_it_comes_late(largest: bool) -> None:
    best = StreamingTopK(2, largest=largest)
    best.update(np.ones(4, np.float32), 10)
    np.testing.assert_array_equal(best.result()[1], [[10, 11]])
    best.update(np.ones(1, np.float32), 3)
    np.testing.assert_array_equal(best.result()[1], [[3, 10]])


def test_a_direction_with_fewer_scores_is_padded() -> None:
    nan = np.nan
    best = StreamingTopK(2, 3)
    best.update(np.array([[1, nan, nan], [2, 5, nan], [3, nan, nan]], np.float32), 0)
    scores, rows = best.result()
    np.testing.assert_array_equal(scores, np.array([[3, 2], [5, nan], [nan, nan]], np.float32))
    np.testing.assert_array_equal(rows, [[2, 1], [1, -1], [-1, -1]])
    np.testing.assert_array_equal(best.nan_count, [0, 2, 3])


def test_updates_may_follow_a_result() -> None:
    values = np.random.default_rng(0).integers(0, 20, 500).astype(np.float32)
    best = StreamingTopK(40)
    for start in range(0, 500, 50):
        best.update(values[start : start + 50], start)
        assert_same(best.result(), full_sorts(values[: start + 50, None], 0, 40, True))


def test_the_caller_may_change_what_it_gave_and_got() -> None:
    values = np.array([3.0, 1.0, 2.0], np.float32)
    best = StreamingTopK(2)
    best.update(values, 0)
    values[:] = 9
    best.result()[0][:] = 7
    assert_same(best.result(), (np.array([[3.0, 2.0]], np.float32), np.array([[0, 2]], np.int64)))


def test_memory_stays_bounded_by_k_and_by_what_was_offered() -> None:
    best = StreamingTopK(10, 2)
    for start in range(0, 100_000, 500):
        best.update(np.ones((500, 2), np.float32), start)  # all tied: nothing can be refused by its score
        assert best._keys.shape == best._rows.shape == (2, 10)
    np.testing.assert_array_equal(best.result()[1], [np.arange(10)] * 2)
    huge = StreamingTopK(10**12)
    huge.update(np.arange(1000, dtype=np.float32), 0)
    assert huge._keys.size <= 2000
    np.testing.assert_array_equal(huge.result()[1], [np.arange(1000)[::-1]])


def test_streams_travel_between_processes() -> None:
    best = StreamingTopK(2)
    best.update(np.array([3.0, 1.0, 2.0], np.float32), 0)
    assert_same(pickle.loads(pickle.dumps(best)).result(), best.result())


def test_merging_leaves_the_other_as_it_was() -> None:
    first, second = StreamingTopK(2), StreamingTopK(2)
    first.update(np.array([1.0, 2.0], np.float32), 0)
    second.update(np.array([5.0], np.float32), 2)
    first.merge(second)
    first.update(np.array([9.0, 8.0], np.float32), 3)
    np.testing.assert_array_equal(second.result()[0], [[5.0]])


def test_streams_that_keep_something_else_are_not_merged() -> None:
    with pytest.raises(ConfigError, match="differ in k: 2 and 3"):
        StreamingTopK(2).merge(StreamingTopK(3))
    with pytest.raises(ConfigError, match="differ in directions: 1 and 2"):
        StreamingTopK(2).merge(StreamingTopK(2, 2))
    with pytest.raises(ConfigError, match="differ in largest: True and False"):
        StreamingTopK(2).merge(StreamingTopK(2, largest=False))


def test_nothing_offered() -> None:
    scores, rows = StreamingTopK(3, 4).result()
    assert scores.shape == rows.shape == (4, 0)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1, not {k}"):
        StreamingTopK(k)


def test_no_directions_are_refused() -> None:
    with pytest.raises(ConfigError, match="directions must be at least 1"):
        StreamingTopK(1, 0)


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((3, 2), np.float32), torch.ones(3).half(), np.ones((), "f4")])
def test_other_scores_are_refused(scores: Any) -> None:
    with pytest.raises(ConfigError, match="float32"):
        StreamingTopK(2).update(scores, 0)


def test_scores_of_one_direction_are_not_those_of_several() -> None:
    with pytest.raises(ConfigError, match=r"\[n, 2\], not float32 \(4,\)"):
        StreamingTopK(2, 2).update(np.ones(4, np.float32), 0)


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
    assert_same(best.result(), full_sorts(values[:, None], 0, 20, True))
    with pytest.raises(AssertionError):
        assert_same(mutant(values, 20), full_sort(values, 0, 20, True))
