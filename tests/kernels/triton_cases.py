"""The Triton kernels against the same references; `test_triton.py` runs this file in a process of its own.

On CPU tensors that process runs under TRITON_INTERPRET=1, on CUDA tensors without it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pairtrace.errors import ConfigError
from pairtrace.kernels import cosine
from pairtrace.kernels.cosine import cosine_max, cosine_scores
from pairtrace.kernels.cosine_triton import DeviceDirections, Rows, planned_scores
from pairtrace.kernels.device_rows import DeviceScaledRows
from pairtrace.kernels.int8 import ScaledRows, encode_int8
from pairtrace.kernels.pooling import pooled_difference, segment_mean
from tests.kernels.rows import DTYPES, assert_scores, awkward_rows, expected_scores
from tests.kernels.test_pooling import exact_means, pack, pair_pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "directions"),
    [
        (0, 5, 1),
        (1, 1, 1),
        (1, 1, 5),
        (7, 3, 2),
        (8, 64, 3),
        (9, 1023, 1),
        (17, 129, 4),
        (65, 33, 5),
        (3, 257, 17),
        (2, 70, 40),
        (2, 31, 65),
    ],
)
def test_scores_equal_float64(dtype: str, count: int, width: int, directions: int) -> None:
    rng = np.random.default_rng(count * 1000 + width)
    rows = torch.from_numpy(awkward_rows(rng, count, width, dtype)).to(getattr(torch, dtype))
    bank = rng.standard_normal((directions, width)).astype(np.float32)
    expected = expected_scores(rows.double().numpy(), bank)
    on_device = rows.to(DEVICE)
    assert_scores(cosine_scores(on_device, bank, impl="triton").cpu().numpy(), expected)
    for layout in (
        on_device.t().contiguous().t(),
        on_device.repeat_interleave(2, dim=0)[::2],
        on_device.repeat_interleave(2, dim=1)[:, ::2],
    ):
        assert_scores(cosine_scores(layout, bank, impl="triton").cpu().numpy(), expected)


@pytest.mark.parametrize("directions", [1, 3, 20])
def test_blocks_of_the_bank_maximum(directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "DEVICE_BLOCK_VALUES", 7 * directions)
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(awkward_rows(rng, 30, 40, "float16") - 4).half()
    bank = rng.standard_normal((directions, 40)) + 4
    expected = expected_scores(rows.double().numpy(), bank)
    assert (np.nanmin(expected.max(axis=1))) < 0
    largest = cosine_max(rows.to(DEVICE), torch.from_numpy(bank).to(DEVICE), impl="triton")
    assert_scores(largest.cpu().numpy(), expected.max(axis=1))


def test_given_norms() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((6, 40))
    values[4] *= 1e25
    norms = 1.5 * np.linalg.norm(values, axis=1)
    norms[:3] = 0.0, np.nan, np.inf
    bank = rng.standard_normal((2, 40))
    expected = expected_scores(values, bank) / 1.5
    expected[:3] = np.nan
    rows = torch.from_numpy(values).float().to(DEVICE)
    scores = cosine_scores(rows, bank, impl="triton", norms=torch.from_numpy(norms).float().to(DEVICE))
    assert_scores(scores.cpu().numpy(), expected)


def unit(bank: np.ndarray) -> np.ndarray:
    return bank / np.linalg.norm(bank, axis=1, keepdims=True)


def _planned(rows: Rows, bank: np.ndarray, norms: np.ndarray | None = None, minus: Rows | None = None) -> np.ndarray:
    score = planned_scores(rows, unit(bank), norms, minus)
    return score(0, len(rows)).cpu().numpy()


def near_and_far(rng: np.random.Generator, bank: np.ndarray, dtype: str) -> torch.Tensor:
    """Rows along, against and across directions of the bank, where errors of the parts show most."""
    rows = np.concatenate([bank[:2] * 3.0, -bank[1:2] * 1e-3, rng.standard_normal((2, bank.shape[1]))])
    return torch.from_numpy(rows).to(getattr(torch, dtype)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_banks(dtype: str) -> None:
    rng = np.random.default_rng(5)
    bank = rng.standard_normal((1000, 140)) * 10.0 ** rng.integers(-20, 20, (1000, 1))
    rows = near_and_far(rng, bank / np.abs(bank).max(axis=1, keepdims=True), dtype)
    assert_scores(_planned(rows, bank), expected_scores(rows.double().cpu().numpy(), bank))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [2, 20])
def test_long_rows(dtype: str, directions: int) -> None:
    """Sums that grow steadily show whether an addition truncates: tensor cores' own sums do."""
    rng = np.random.default_rng(8)
    bank = np.abs(rng.standard_normal((directions, 4096)))
    rows = near_and_far(rng, bank, dtype)
    scores = _planned(rows, bank)
    np.testing.assert_allclose(scores, expected_scores(rows.double().cpu().numpy(), bank), rtol=0, atol=2e-6)


def test_parts_keep_22_bits() -> None:
    rng = np.random.default_rng(7)
    bank = rng.standard_normal((50, 200)) * 10.0 ** rng.integers(-4, 1, (50, 200))
    bank[:, 3] *= 1000.0  # outlier dimension
    units = unit(bank)
    high, low, factors = DeviceDirections(units, torch.device(DEVICE)).parts(None)
    assert high.shape[0] % 128 == high.shape[1] % 128 == 0
    held = ((high.double() + low.double()) * factors.double()[:, None]).cpu().numpy()
    assert not held[50:].any()
    assert not held[:, 200:].any()
    largest = np.abs(units).max(axis=1, keepdims=True)
    assert (np.abs(held[:50, :200] - units) <= 2.0**-22 * np.abs(units) + 2.0**-38 * largest).all()


def test_parts_that_lack_the_low_half_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    bank = rng.standard_normal((6, 140))
    rows = near_and_far(rng, bank, "float16")
    expected = expected_scores(rows.double().cpu().numpy(), bank)
    assert_scores(_planned(rows, bank), expected)
    parts = DeviceDirections.parts

    def without_low(self: DeviceDirections, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        high, low, factors = parts(self, scale)
        return high, torch.zeros_like(low), factors

    monkeypatch.setattr(DeviceDirections, "parts", without_low)
    with pytest.raises(AssertionError):
        assert_scores(_planned(rows, bank), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width", "directions"), [(0, 4, 1), (9, 33, 1), (5, 1023, 5), (17, 40, 17)])
def test_differences(dtype: str, count: int, width: int, directions: int) -> None:
    rng = np.random.default_rng(count + width)
    sides = [torch.from_numpy(awkward_rows(rng, count, width, dtype)).to(getattr(torch, dtype)) for _ in range(2)]
    for side in sides[:count]:
        side[:1] = 2.0**-12
        side[:1, width // 2] = 1.0
    sides[0][:1, 0] *= 2  # all but one column cancel
    difference = sides[0].double().numpy() - sides[1].double().numpy()
    bank = rng.standard_normal((directions, width))
    scores = _planned(sides[0].to(DEVICE), bank, minus=sides[1].to(DEVICE))
    assert_scores(scores, expected_scores(difference, bank))
    strided = sides[1].to(DEVICE).repeat_interleave(2, dim=1)[:, ::2]
    assert_scores(_planned(sides[0].to(DEVICE), bank, minus=strided), expected_scores(difference, bank))


def test_differences_of_unlike_sides_are_refused() -> None:
    rows = torch.ones(3, 4, device=DEVICE)
    for minus in (rows[:2], rows.half()):
        with pytest.raises(ConfigError, match="must agree"):
            DeviceDirections(np.ones((1, 4)) / 2, rows.device).score(rows, minus=minus)


def scaled_rows(rng: np.random.Generator, count: int, width: int) -> ScaledRows:
    values = rng.standard_normal((count, width)) * 10.0 ** rng.integers(-3, 3, (count, 1))
    values[:, :1] *= 100.0
    values[1:2] = 0.0
    return encode_int8(values)


def decoded(rows: ScaledRows) -> np.ndarray:
    return rows.values * rows.row_scale.astype(np.float64)[:, None] * rows.column_scale.astype(np.float64)


@pytest.mark.parametrize(("count", "width", "directions"), [(0, 5, 1), (9, 33, 2), (7, 1023, 5), (5, 64, 130)])
def test_scaled_int8(count: int, width: int, directions: int) -> None:
    rng = np.random.default_rng(width)
    rows, minus = scaled_rows(rng, count, width), scaled_rows(rng, count, width)
    bank = rng.standard_normal((directions, width))
    on_device = DeviceScaledRows.on(rows, DEVICE)
    expected = expected_scores(decoded(rows), bank)
    assert_scores(_planned(on_device, bank), expected)
    norms = (2 * np.linalg.norm(decoded(rows), axis=1)).astype(np.float32)
    assert_scores(_planned(on_device, bank, norms), expected / 2)
    same_columns = ScaledRows(minus.values, minus.row_scale, rows.column_scale)
    for other in (same_columns, minus):
        difference = expected_scores(decoded(rows) - decoded(other), bank)
        assert_scores(_planned(on_device, bank, minus=DeviceScaledRows.on(other, DEVICE)), difference)


def test_scaled_rows_of_other_shapes_are_refused() -> None:
    values, rows, columns = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3), torch.ones(4)
    for parts in ((values.float(), rows, columns), (values, rows[:2], columns), (values, rows, columns.double())):
        with pytest.raises(ConfigError, match="must be"):
            DeviceScaledRows(*parts)
    assert DeviceScaledRows(values, rows, columns)[1:].shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    ("lengths", "width"), [([], 4), ([0], 3), ([1], 1), ([3, 0, 70, 32], 129), ([33, 65], 128), ([200, 1, 1], 7)]
)
def test_segment_means(lengths: list[int], width: int, dtype: torch.dtype, scattered: bool) -> None:
    hidden, segments = pack(np.random.default_rng(3), lengths, width, dtype, scattered)
    expected = exact_means(hidden, segments, len(lengths))
    for layout in (hidden, hidden.t().contiguous().t(), hidden.repeat_interleave(2, dim=1)[:, ::2]):
        means = segment_mean(layout.to(DEVICE), segments.to(DEVICE), len(lengths), impl="triton").cpu().numpy()
        # float32 sums: the error follows the largest values of the segment, not their mean.
        np.testing.assert_array_equal(np.isnan(means), np.isnan(expected))
        np.testing.assert_allclose(means, expected, rtol=1e-5, atol=3e-4)


def test_contiguous_segments_do_not_depend_on_the_rest_of_the_pack() -> None:
    own = torch.from_numpy(np.random.default_rng(4).standard_normal((61, 130))).float()
    alone = segment_mean(own.to(DEVICE), torch.zeros(61, dtype=torch.int64, device=DEVICE), 1, impl="triton")[0]
    hidden = torch.cat([torch.randn(45, 130) * 100, own, torch.randn(9, 130)])
    segments = torch.tensor([0] * 45 + [1] * 61 + [-1] * 9)
    assert torch.equal(segment_mean(hidden.to(DEVICE), segments.to(DEVICE), 2, impl="triton")[1], alone)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("lengths", "width"), [([], 4), ([(1, 1, 1)], 1), ([(0, 40, 3), (5, 1, 33), (2, 3, 2)], 300)])
def test_pooled_differences_equal_the_reference(lengths: list[tuple[int, int, int]], width: int, dtype: str) -> None:
    hidden, segments, weight = pair_pack(np.random.default_rng(5), lengths, width, torch.bfloat16)
    expected = pooled_difference(
        hidden.double().float(), segments, len(lengths), shared_weight=weight, dtype="float32", sides=True
    )
    for layout in (hidden, hidden.t().contiguous().t()):
        pooled = pooled_difference(
            layout.to(DEVICE),
            segments.to(DEVICE),
            len(lengths),
            shared_weight=weight.to(DEVICE),
            dtype=dtype,  # type: ignore[arg-type]
            sides=True,
            impl="triton",
        )
        step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 1e-6}[dtype]
        for name in ("diff", "chosen", "rejected"):
            actual, right = getattr(pooled, name).cpu(), getattr(expected, name)
            assert actual.dtype == getattr(torch, dtype)
            torch.testing.assert_close(actual.float(), right, rtol=1.01 * step, atol=2e-5)
        torch.testing.assert_close(pooled.norm.cpu(), expected.norm, rtol=1e-5, atol=1e-5)
    alone = pooled_difference(
        hidden.to(DEVICE), segments.to(DEVICE), len(lengths), shared_weight=weight.to(DEVICE), impl="triton"
    )
    assert alone.chosen is None
    assert torch.equal(alone.norm.cpu(), pooled.norm.cpu())


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8 - 2.0**-16, 3.4e38, 1e-40, float("nan"), 0.0]
    hidden = torch.tensor([values, [0.0] * len(values)], device=DEVICE)
    segments = torch.tensor([1, 2], device=DEVICE)
    diff = pooled_difference(hidden, segments, 1, dtype="bfloat16", impl="triton").diff[0].cpu()
    expected = torch.tensor(values).bfloat16()
    assert torch.equal(torch.nan_to_num(diff, nan=7.0), torch.nan_to_num(expected, nan=7.0))
