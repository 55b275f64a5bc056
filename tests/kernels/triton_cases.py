"""The Triton kernels against the same references; `test_triton.py` runs this file in a process of its own.

On CPU tensors that process runs under TRITON_INTERPRET=1, on CUDA tensors without it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pairtrace.kernels import cosine
from pairtrace.kernels.cosine import cosine_max, cosine_scores
from pairtrace.kernels.pooling import segment_mean
from tests.kernels.rows import DTYPES, assert_scores, awkward_rows, expected_scores
from tests.kernels.test_pooling import exact_means, pack

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
