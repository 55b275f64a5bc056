"""The best rows of each direction against a full sort of all scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError, DirectionError
from pairtrace.kernels import cosine
from pairtrace.kernels.cosine import cosine_blocks, cosine_scores
from pairtrace.kernels.cosine_topk import cosine_topk
from pairtrace.kernels.int8 import encode_int8


def full_sort(scores: np.ndarray, k: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first k of a full sort of float32 [N, K] per direction, ties by the lower row."""
    orders = []
    for column in scores.T:
        ranked = np.flatnonzero(~np.isnan(column))
        orders.append(ranked[np.lexsort((ranked, -column[ranked] if largest else column[ranked]))][:k])
    rows = np.stack(orders)
    return np.take_along_axis(scores.T, rows, axis=1), rows


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([0, 1, 2, 30, 1023]),
    directions=st.sampled_from([1, 2, 5, 40]),
    k=st.sampled_from([1, 3, 2000]),
    largest=st.booleans(),
    kind=st.sampled_from(["numpy", "torch", "int8"]),
    block=st.sampled_from([100, 1 << 22]),
)
@settings(deadline=None, max_examples=60)
def test_equal_to_a_full_sort(
    seed: int, count: int, directions: int, k: int, largest: bool, kind: str, block: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, 9)).astype(np.float32)
    values = values[rng.integers(0, max(1, count // 2), count)]
    values[rng.random(count) < 0.1] = 0.0
    bank = rng.standard_normal((directions, 9))
    rows = {"numpy": lambda: values, "torch": lambda: torch.from_numpy(values), "int8": lambda: encode_int8(values)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine, "IN_PLACE_BLOCK_VALUES", block)
        found = cosine_topk(rows[kind](), bank, k, largest)
        # The same blocks: the last bits of a matrix product may depend on their size, and ties on the last bits.
        blocks = [np.array(scores) for _, scores in cosine_blocks(rows[kind](), bank)]
    scores = np.concatenate([np.empty((0, directions), np.float32), *blocks])
    best, numbers = full_sort(scores, k, largest)
    np.testing.assert_array_equal(found.rows, numbers)
    np.testing.assert_allclose(found.scores, best, rtol=0, atol=1e-6)
    assert found.nan_count == np.isnan(scores[:, 0]).sum()


def test_differences_and_given_norms() -> None:
    rng = np.random.default_rng(1)
    chosen, rejected = rng.standard_normal((2, 40, 8)).astype(np.float32)
    norms = rng.random(40).astype(np.float32) + 1
    bank = rng.standard_normal((2, 8))
    found = cosine_topk(chosen, bank, 5, minus=rejected, norms=norms)
    scores = cosine_scores(chosen - rejected, bank, norms=norms)
    np.testing.assert_array_equal(found.rows, full_sort(scores, 5, True)[1])


def test_unusable_arguments_are_refused() -> None:
    rows = np.ones((3, 4), np.float32)
    with pytest.raises(ConfigError, match="k must be at least 1"):
        cosine_topk(rows, np.ones(4), 0)
    with pytest.raises(DirectionError, match="width 5"):
        cosine_topk(rows, np.ones(5), 1)
    with pytest.raises(ConfigError, match="triton"):
        cosine_topk(rows, np.ones(4), 1, impl="triton")
