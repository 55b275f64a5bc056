"""Segment means against exact sums, and their independence from the rest of the pack."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError, MissingDependencyError
from pairtrace.kernels.pooling import PooledDifference, pooled_difference, segment_mean

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def exact_means(hidden: torch.Tensor, segments: torch.Tensor, count: int) -> np.ndarray:
    """Means from exactly rounded sums (math.fsum), float32 [count, D]."""
    values = hidden.double().numpy()
    means = np.full((count, hidden.shape[1]), np.nan)
    for segment in range(count):
        own = values[(segments == segment).numpy()]
        if len(own):
            means[segment] = [math.fsum(column) / len(own) for column in own.T]
    return means.astype(np.float32)


def pack(rng: np.random.Generator, lengths: list[int], width: int, dtype: torch.dtype, scattered: bool) -> Any:
    """Hidden states and segments with unpooled tokens between the segments; scattered ones interleave."""
    segments: list[int] = []
    for segment, length in enumerate(lengths):
        segments += [-1] * int(rng.integers(0, 4)) + [segment] * length
    ids = np.array(segments, np.int64)
    if scattered:
        rng.shuffle(ids)
    hidden = torch.from_numpy(rng.standard_normal((len(ids), width)) * 10.0 ** rng.integers(-2, 3, (len(ids), 1)))
    return hidden.to(dtype), torch.from_numpy(ids)


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 70), max_size=6),
    width=st.sampled_from([1, 2, 3, 16, 17, 33, 130]),
    dtype=st.sampled_from(DTYPES),
    scattered=st.booleans(),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_means_are_the_exact_means_rounded(
    seed: int, lengths: list[int], width: int, dtype: torch.dtype, scattered: bool, strided: bool
) -> None:
    hidden, segments = pack(np.random.default_rng(seed), lengths, width, dtype, scattered)
    offered = hidden.repeat_interleave(2, dim=1)[:, ::2] if strided else hidden
    means = segment_mean(offered, segments, len(lengths))
    assert means.dtype == torch.float32
    np.testing.assert_allclose(means.numpy(), exact_means(hidden, segments, len(lengths)), rtol=1.2e-7, atol=1e-30)


def _means_alone_and_together(
    mean: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], dtype: torch.dtype, width: int
) -> None:
    """The same segment alone, in packs with others before and after it, and in other memory layouts: same bits."""
    rng = np.random.default_rng(0)
    own = torch.from_numpy(rng.standard_normal((61, width)) * 10.0 ** rng.integers(-3, 4, (61, 1))).to(dtype)
    alone = mean(own, torch.zeros(61, dtype=torch.int64), 1)[0]
    for before, after in [(0, 40), (1, 0), (7, 3), (200, 200)]:
        noise = torch.from_numpy(rng.standard_normal((before + after, width)) * 100).to(dtype)
        hidden = torch.cat([noise[:before], own, noise[before:]])
        segments = torch.tensor([0] * before + [1] * 61 + [2] * after)
        assert torch.equal(mean(hidden, segments, 3)[1], alone)
        assert torch.equal(mean(hidden.t().contiguous().t(), segments, 3)[1], alone)
        where = torch.from_numpy(np.sort(rng.choice(len(hidden), 61, replace=False)))
        scattered, ids = noise.new_zeros(len(hidden), width) + 3, torch.full((len(hidden),), -1)
        scattered[where], ids[where] = own, 1
        assert torch.equal(mean(scattered, ids, 3)[1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 515])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_rest_of_the_pack(dtype: torch.dtype, width: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _means_alone_and_together(segment_mean, dtype, width)
    finally:
        torch.set_num_threads(before)


def _by_running_sum(hidden: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
    """Differences of a running sum over the pack: right up to rounding, but the rounding comes from the neighbors."""
    running = torch.cat([torch.zeros(1, hidden.shape[1]), hidden.float().cumsum(0)])
    means = torch.full((count, hidden.shape[1]), torch.nan)
    for segment in range(count):
        own = (segments == segment).nonzero().flatten()
        if len(own):
            means[segment] = (running[own[-1] + 1] - running[own[0]]) / len(own)
    return means


def test_a_pooling_that_leaks_rounding_between_segments_is_caught() -> None:
    with pytest.raises(AssertionError):
        _means_alone_and_together(_by_running_sum, torch.float32, 64)


def test_a_value_that_is_not_finite_stays_in_its_segment_and_column() -> None:
    hidden = torch.ones(6, 3)
    hidden[1, 2] = torch.nan
    hidden[5, 0] = torch.inf  # not pooled
    means = segment_mean(hidden, torch.tensor([0, 0, 1, 1, 1, -1]), 2)
    assert torch.equal(torch.isnan(means), torch.tensor([[False, False, True], [False, False, False]]))
    assert torch.equal(means[1], torch.ones(3))


def test_large_float16_values_do_not_overflow() -> None:
    hidden = torch.full((1000, 4), 65504.0, dtype=torch.float16)
    assert torch.equal(segment_mean(hidden, torch.zeros(1000, dtype=torch.int64), 1), torch.full((1, 4), 65504.0))


def test_segments_without_tokens_have_no_mean() -> None:
    means = segment_mean(torch.ones(2, 3), torch.tensor([2, -1]), 4)
    assert torch.equal(torch.isnan(means[:, 0]), torch.tensor([True, True, False, True]))
    assert segment_mean(torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), 0).shape == (0, 3)
    assert torch.isnan(segment_mean(torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), 2)).all()


MUTATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "span shifted by one": lambda hidden, segments, count: segment_mean(hidden, segments.roll(1), count),
    "unpooled tokens join the first segment": lambda hidden, segments, count: segment_mean(
        hidden, segments.clamp(min=0), count
    ),
    "sum instead of mean": lambda hidden, segments, count: (
        segment_mean(hidden, segments, count) * torch.bincount(segments + 1)[1:, None]
    ),
    "half-precision sums": lambda hidden, segments, count: torch.stack(
        [hidden[segments == s].bfloat16().mean(0).float() for s in range(count)]
    ),
    "segments swapped": lambda hidden, segments, count: segment_mean(hidden, segments, count).flip(0),
}


@pytest.mark.parametrize("mutation", sorted(MUTATIONS))
def test_mutations_are_caught(mutation: str) -> None:
    hidden = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 5))).float()
    segments = torch.tensor([-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, 1, -1])
    expected = exact_means(hidden, segments, 2)
    np.testing.assert_allclose(segment_mean(hidden, segments, 2), expected, rtol=1.2e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(MUTATIONS[mutation](hidden, segments, 2), expected, rtol=1.2e-7)


@pytest.mark.parametrize(
    ("hidden", "segments", "count", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, r"\[T, D\]"),
        (torch.ones(3, 2).double(), torch.zeros(3, dtype=torch.int64), 1, "float64"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), 1, r"\(3,\).*\(2,\)"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int32), 1, "int32"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64, device="meta"), 1, "meta"),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), 2, r"\[-1, 2\), but range from 0 to 2"),
        (torch.ones(3, 2), torch.tensor([0, -2, 1]), 2, "from -2 to 1"),
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), -1, "negative"),
    ],
)
def test_unusable_arguments_are_refused(hidden: Any, segments: Any, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        segment_mean(hidden, segments, count)


def test_explicit_choices_that_cannot_run_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.ones(2, 2), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match="'numba'"):
        segment_mean(*arguments, impl="numba")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pairtrace.kernels.pooling_triton", raising=False)
    monkeypatch.delattr("pairtrace.kernels.pooling_triton", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pairtrace\[gpu\]"):
        segment_mean(*arguments, impl="triton")


def pair_pack(
    rng: np.random.Generator, lengths: list[tuple[int, int, int]], width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, segments and shared weights of pairs with (shared, chosen, rejected) pooled tokens."""
    flat = [length for pair in lengths for length in pair]
    hidden, segments = pack(rng, flat, width, dtype, scattered=False)
    weight = np.array([[s / (s + c), s / (s + r)] for s, c, r in lengths]).reshape(-1, 2)
    return hidden, segments, torch.from_numpy(weight).float()


def exact_pairs(hidden: torch.Tensor, segments: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chosen and rejected means, float64 [P, D] each, over all tokens of a side without a detour over shares."""
    values, numbers = hidden.double().numpy(), segments.numpy()
    sides = []
    for own in (1, 2):
        means = [values[np.isin(numbers, [3 * pair, 3 * pair + own])].mean(axis=0) for pair in range(count)]
        sides.append(np.array(means).reshape(count, hidden.shape[1]))
    return sides[0], sides[1]


LENGTHS = [(0, 3, 5), (4, 1, 2), (7, 6, 1)]


def _check_pairs(pool: Callable[..., PooledDifference], dtype: Any = "float32") -> None:
    hidden, segments, weight = pair_pack(np.random.default_rng(6), LENGTHS, 33, torch.float32)
    chosen, rejected = exact_pairs(hidden, segments, len(LENGTHS))
    pooled = pool(hidden, segments, len(LENGTHS), shared_weight=weight, dtype=dtype, sides=True)
    assert pooled.chosen is not None
    assert pooled.rejected is not None
    step = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for actual, expected in ((pooled.diff, chosen - rejected), (pooled.chosen, chosen), (pooled.rejected, rejected)):
        assert actual.dtype == getattr(torch, dtype)
        np.testing.assert_allclose(actual.double(), expected, rtol=1.01 * step, atol=3e-5)
    # Before rounding: the stored difference's own norm is further away.
    np.testing.assert_allclose(pooled.norm, np.linalg.norm(chosen - rejected, axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pooled_differences_are_those_of_all_tokens(dtype: str) -> None:
    _check_pairs(pooled_difference, dtype)


def _spoiled(change: Callable[[PooledDifference], dict[str, Any]]) -> Callable[..., PooledDifference]:
    def pool(*arguments: Any, **settings: Any) -> PooledDifference:
        pooled = pooled_difference(*arguments, **settings)
        return PooledDifference(
            **{"diff": pooled.diff, "norm": pooled.norm, "chosen": pooled.chosen, "rejected": pooled.rejected}
            | change(pooled)
        )

    return pool


PAIR_MUTATIONS: dict[str, Callable[..., PooledDifference]] = {
    "sides swapped": _spoiled(lambda pooled: {"chosen": pooled.rejected, "rejected": pooled.chosen}),
    "difference reversed": _spoiled(lambda pooled: {"diff": -pooled.diff}),
    "norm of the rounded difference": _spoiled(
        lambda pooled: {"norm": pooled.diff.bfloat16().double().norm(dim=1).float()}
    ),
    "shared tokens left out": lambda *arguments, **settings: pooled_difference(
        *arguments, **settings | {"shared_weight": None}
    ),
    "shares swapped": lambda *arguments, shared_weight, **settings: pooled_difference(
        *arguments, shared_weight=shared_weight.flip(1).contiguous(), **settings
    ),
}


@pytest.mark.parametrize("mutation", sorted(PAIR_MUTATIONS))
def test_mutations_of_pooled_differences_are_caught(mutation: str) -> None:
    with pytest.raises(AssertionError):
        _check_pairs(PAIR_MUTATIONS[mutation])


def test_pairs_without_tokens_or_columns() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    pooled = pooled_difference(torch.ones(0, 3), empty, 2)
    assert torch.isnan(pooled.diff).all()
    assert torch.isnan(pooled.norm).all()
    assert pooled.chosen is None
    assert pooled_difference(torch.ones(0, 3), empty, 0).diff.shape == (0, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"shared_weight": torch.ones(1, 3)}, r"\(1, 2\)"),
        ({"shared_weight": torch.ones(1, 2).double()}, "float64"),
        ({"shared_weight": torch.ones(1, 2, device="meta")}, "meta"),
        ({"n_pairs": -1}, "negative"),
        ({"impl": "numba"}, "numba"),
    ],
)
def test_unusable_settings_of_pooled_differences_are_refused(settings: dict[str, Any], message: str) -> None:
    arguments = {"n_pairs": 1} | settings
    with pytest.raises(ConfigError, match=message):
        pooled_difference(torch.ones(2, 2), torch.tensor([1, 2]), **arguments)
