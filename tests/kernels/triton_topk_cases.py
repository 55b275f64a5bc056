"""Ranking in the Triton kernels against full sorts; `test_triton.py` runs this file as it runs `triton_cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import ConfigError
from pairtrace.kernels import topk_triton
from pairtrace.kernels.cosine import cosine_scores
from pairtrace.kernels.cosine_topk import TopK, cosine_topk
from pairtrace.kernels.cosine_triton import DeviceDirections
from pairtrace.kernels.topk_triton import DeviceTopK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a cosine in float32.
LAST_BIT = 2.0**-23


def full_sort(scores: np.ndarray, k: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first k of a full sort of float32 [N, K] per direction, ties by the lower row."""
    orders = []
    for column in scores.T:
        ranked = np.flatnonzero(~np.isnan(column))
        orders.append(ranked[np.lexsort((ranked, -column[ranked] if largest else column[ranked]))][:k])
    rows = np.stack(orders) if orders else np.empty((0, 0), np.int64)
    return np.take_along_axis(scores.T, rows, axis=1), rows


def tied_rows(rng: np.random.Generator, count: int, width: int) -> torch.Tensor:
    """float16 [count, width] with repeated, opposite, zero and NaN rows, on the device."""
    values = rng.standard_normal((count, width))
    values = values[rng.integers(0, max(1, count // 2), count)] * rng.choice([-1.0, 1.0, 2.0], (count, 1))
    values[rng.random(count) < 0.05] = 0.0
    values[rng.random(count) < 0.05] = np.nan
    return torch.from_numpy(values).half().to(DEVICE)


def _assert_ranked(found: tuple[np.ndarray, np.ndarray], scores: np.ndarray, k: int, largest: bool) -> None:
    best, numbers = full_sort(scores, k, largest)
    assert found[0].dtype == np.float32
    assert found[1].dtype == np.int64
    if DEVICE == "cuda":
        np.testing.assert_array_equal(found[1], numbers)
        np.testing.assert_array_equal(found[0], best)
        return
    # The interpreter multiplies with numpy, whose last bit depends on where in memory the operands lie. So equal rows
    # may trade places, and no others.
    assert found[0].shape == best.shape
    np.testing.assert_allclose(found[0], best, rtol=0, atol=LAST_BIT)
    np.testing.assert_allclose(np.take_along_axis(scores.T, found[1], axis=1), best, rtol=0, atol=LAST_BIT)
    assert all(len(set(rows)) == len(rows) for rows in found[1].tolist())


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([0, 1, 15, 17, 63]),
    width=st.sampled_from([1, 3, 33]),
    directions=st.sampled_from([1, 3, 5, 17]),
    k=st.sampled_from([1, 2, 7, 200]),
    largest=st.booleans(),
    capacity=st.sampled_from([9, 16, 1000]),
    step=st.sampled_from([20, 1000]),
)
@settings(deadline=None, max_examples=12)
def test_equal_to_a_full_sort(
    seed: int, count: int, width: int, directions: int, k: int, largest: bool, capacity: int, step: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = tied_rows(rng, count, width)
    bank = rng.standard_normal((directions, width))
    units = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    scores = cosine_scores(rows, bank, impl="triton").cpu().numpy()
    best = DeviceTopK(DeviceDirections(units, rows.device), k, largest=largest, capacity=capacity)
    for start in range(0, count, step):
        best.update(rows[start : start + step], start)
    _assert_ranked(best.result(), scores, k, largest)
    assert best.nan_count == np.isnan(scores[:, 0]).sum()


def _rising() -> tuple[torch.Tensor, np.ndarray]:
    """Rows whose scores rise, so that every row beats all before it."""
    angles = np.linspace(1.5, 0.1, 60)
    rows = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1)).float().to(DEVICE)
    return rows, np.array([[1.0, 0.0]])


def _check_rising(rank: Callable[[torch.Tensor, np.ndarray], TopK]) -> None:
    rows, bank = _rising()
    found = rank(rows, bank)
    _assert_ranked((found.scores, found.rows), cosine_scores(rows, bank, impl="triton").cpu().numpy(), 4, True)


def test_survivors_past_the_buffer_are_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_triton, "FEWEST_CANDIDATES", 16)
    monkeypatch.setattr(topk_triton, "FILLING", 100.0)
    monkeypatch.setattr(topk_triton, "CANDIDATES", 16)
    _check_rising(lambda rows, bank: cosine_topk(rows, bank, 4, impl="triton"))


def test_mutations_of_the_ranking_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FEWEST_CANDIDATES", 16), ("FILLING", 100.0), ("CANDIDATES", 16)):
        monkeypatch.setattr(topk_triton, name, value)
    spoiled: dict[str, Callable[[torch.Tensor, np.ndarray], TopK]] = {
        "smallest": lambda rows, bank: cosine_topk(rows, bank, 4, False, impl="triton"),
        "rows of a block": lambda rows, bank: cosine_topk(rows[10:], bank, 4, impl="triton"),
    }
    for mutation in spoiled.values():
        with pytest.raises(AssertionError):
            _check_rising(mutation)
    # An overflow that goes unnoticed loses the best rows.
    update = DeviceTopK.update

    def unnoticed(self: DeviceTopK, *arguments: object) -> None:
        self.capacity = 10**6
        update(self, *arguments)

    monkeypatch.setattr(DeviceTopK, "update", lambda self, rows, start, **others: unnoticed(self, rows, start))
    with pytest.raises(AssertionError):
        _check_rising(lambda rows, bank: cosine_topk(rows, bank, 4, impl="triton"))


def test_tied_rows_come_in_order_whatever_the_score_of_zero_is_called() -> None:
    rows = torch.tensor([[0.0, 1.0], [-0.0, 2.0], [1e-30, -1.0], [0.0, -3.0]], device=DEVICE)
    bank = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = cosine_topk(rows, bank, 4, impl="triton")
    assert found.rows[0].tolist() == [2, 0, 1, 3]
    assert found.rows[1].tolist() == [0, 1, 3, 2]


def test_row_numbers_past_the_keys_are_refused() -> None:
    rows, bank = _rising()
    best = DeviceTopK(DeviceDirections(bank, rows.device), 3)
    with pytest.raises(ConfigError, match="4294967296"):
        best.update(rows, 2**32 - 30)
    best.update(rows, 2**32 - 60)
    assert best.result()[1].tolist() == [[2**32 - 1, 2**32 - 2, 2**32 - 3]]
