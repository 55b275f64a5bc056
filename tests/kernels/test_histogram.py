"""The histogram of scores against numpy.histogram and numpy.quantile over the full sample."""

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
from pairtrace.kernels.histogram import ScoreHistogram


def expected_counts(scores: np.ndarray, bins: int) -> np.ndarray:
    columns = [np.clip(column[~np.isnan(column)].astype(np.float64), -1, 1) for column in scores.T]
    return np.stack([np.histogram(column, bins, range=(-1, 1))[0] for column in columns])


def _scores(rng: np.random.Generator, shape: tuple[int, int], kind: str, bins: int) -> np.ndarray:
    if kind == "edges":
        values = rng.choice(np.linspace(-1, 1, bins + 1), shape)
    elif kind == "beside edges":
        edges = rng.choice(np.linspace(-1, 1, bins + 1), shape).astype(np.float32)
        values = np.nextafter(edges, rng.choice(np.array([-2, 2], np.float32), shape))
    elif kind == "tiny":
        values = rng.choice([-1e-45, -1e-30, -0.0, 0.0, 1e-30, 1e-45], shape)
    else:
        values = rng.uniform(-1, 1, shape)
    scores = values.astype(np.float32)
    scores[rng.random(shape) < 0.1] = np.nan
    return scores


@given(
    count=st.integers(0, 300),
    directions=st.sampled_from([1, 2, 5, 16, 17, 40]),
    bins=st.one_of(st.sampled_from([1, 2, 4096]), st.integers(1, 1000)),
    kind=st.sampled_from(["uniform", "edges", "beside edges", "tiny"]),
    block=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    tensors=st.booleans(),
    streams=st.integers(1, 3),
)
@settings(deadline=None, max_examples=120)
def test_equals_numpys_histogram_for_any_blocks_and_any_merging(
    count: int, directions: int, bins: int, kind: str, block: int, seed: int, tensors: bool, streams: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = _scores(rng, (count, directions), kind, bins)
    histograms = [ScoreHistogram(directions, bins) for _ in range(streams)]
    for start in rng.permutation(np.arange(0, count, block)):
        part = scores[start : start + block]
        histograms[rng.integers(streams)].update(torch.from_numpy(part) if tensors else part)
    for other in histograms[1:]:
        histograms[0].merge(other)
    assert histograms[0].counts.dtype == np.int64
    np.testing.assert_array_equal(histograms[0].counts, expected_counts(scores, bins))
    np.testing.assert_array_equal(histograms[0].nan_count, np.isnan(scores).sum(axis=0))


@given(
    count=st.integers(1, 400),
    bins=st.sampled_from([3, 64, 4096]),
    q=st.one_of(st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.floats(0, 1)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=120)
def test_quantiles_are_within_a_bin_of_the_full_samples(count: int, bins: int, q: float, seed: int) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    histogram = ScoreHistogram(2, bins)
    histogram.update(scores)
    expected = np.quantile(scores.astype(np.float64), q, axis=0, method="inverted_cdf")
    assert (np.abs(histogram.quantile(q) - expected) <= 2 / bins).all()


@given(bins=st.sampled_from([2, 8, 4096]), place=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_counts_from_an_edge_upwards_are_exact(bins: int, place: float, seed: int) -> None:
    scores = np.random.default_rng(seed).uniform(-1, 1, (300, 3)).astype(np.float32)
    histogram = ScoreHistogram(3, bins)
    histogram.update(scores)
    edge = float(histogram.edges[round(place * (bins - 1))])
    np.testing.assert_array_equal(histogram.count_at_least(edge), (scores >= edge).sum(axis=0))


def test_counts_from_within_a_bin_include_the_whole_bin() -> None:
    histogram = ScoreHistogram(bins=4)
    histogram.update(np.array([-0.6, 0.1, 0.4, 0.6, 1.0], np.float32))
    assert histogram.count_at_least(0.3).tolist() == [4]
    assert histogram.count_at_least(1.0).tolist() == [2]
    assert histogram.count_at_least(-1.0).tolist() == [5]


def test_scores_that_rounding_carried_past_one_are_in_the_outer_bins() -> None:
    histogram = ScoreHistogram(bins=8)
    beyond = np.float32(1.0000002)
    histogram.update(np.array([beyond, -beyond, 1, -1, 1.005], np.float32))
    assert histogram.counts.tolist() == [[2, 0, 0, 0, 0, 0, 0, 3]]


@pytest.mark.parametrize("value", [1.5, -2, np.inf, -np.inf])
def test_values_that_are_no_cosines_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="between -1 and 1, but 1 are beyond"):
        ScoreHistogram(2).update(np.array([[0, value]], np.float32))


def test_a_direction_without_scores_has_no_quantile() -> None:
    histogram = ScoreHistogram(2)
    histogram.update(np.array([[0.25, np.nan]], np.float32))
    low, missing = histogram.quantile(0.5)
    assert abs(low - 0.25) <= 2 / 4096
    assert np.isnan(missing)


def test_histograms_travel_between_processes() -> None:
    histogram = ScoreHistogram(bins=4)
    histogram.update(np.array([0.5, np.nan], np.float32))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(histogram)).counts, histogram.counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ScoreHistogram(0), "directions must be at least 1, not 0"),
        (lambda: ScoreHistogram(bins=0), "bins must be at least 1, not 0"),
        (lambda: ScoreHistogram().quantile(1.5), "between 0 and 1, not 1.5"),
        (lambda: ScoreHistogram().quantile(float("nan")), "between 0 and 1, not nan"),
        (lambda: ScoreHistogram().count_at_least(-1.5), "between -1 and 1, not -1.5"),
        (lambda: ScoreHistogram(2).merge(ScoreHistogram(3)), "differ in directions and bins"),
        (lambda: ScoreHistogram(2).merge(ScoreHistogram(2, bins=7)), "differ in directions and bins"),
        (lambda: ScoreHistogram().update(np.zeros(3)), "float32"),
        (lambda: ScoreHistogram(2).update(np.zeros(2, np.float32)), "float32"),
    ],
)
def test_what_cannot_be_counted_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def _truncated_towards_zero(scores: np.ndarray) -> np.ndarray:
    # Places counted from 0 by truncation: negative scores land one bin too high.
    places = (scores * 32).astype(np.int64) + 32
    return np.bincount(np.minimum(places, 63), minlength=64)[None]


# Silent mistakes: each makes a histogram in 64 bins that must differ from NumPy's.
MUTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "truncated towards zero": _truncated_towards_zero,
    "upper edges belong to a bin": lambda scores: expected_counts(np.nextafter(scores, np.float32(-2))[:, None], 64),
    "sum rounded in float32": lambda scores: expected_counts(((scores + np.float32(1)) - np.float32(1))[:, None], 64),
    "absolute scores": lambda scores: expected_counts(np.abs(scores)[:, None], 64),
}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_mutations_are_caught(mutation: str) -> None:
    scores = np.concatenate([np.linspace(-1, 1, 65), [-1e-20, -0.3, 0.7]]).astype(np.float32)
    expected = expected_counts(scores[:, None], 64)
    histogram = ScoreHistogram(bins=64)
    histogram.update(scores)
    np.testing.assert_array_equal(histogram.counts, expected)
    assert not np.array_equal(MUTATIONS[mutation](scores), expected)
