"""The random projection: inner products, the generator, blocks."""

from __future__ import annotations

import numpy as np
import torch

from pairtrace.engine.baselines.gradient_products import projected_rows, summed_rows, target_products
from pairtrace.engine.baselines.gradient_projection import SparseProjection, splitmix64

COORDINATES, SIZE = 20_000, 1024


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors that lean on each other, with a few large coordinates as gradients have them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, COORDINATES)) * (1 + 30 * (rng.random(COORDINATES) < 0.001))
    values += 0.7 * values[0]
    return torch.tensor(values / np.linalg.norm(values, axis=1, keepdims=True), dtype=torch.float32)


def test_inner_products_are_kept_within_their_variance() -> None:
    given = vectors(40)
    exact = (given @ given.T).numpy()
    errors = []
    for seed in range(5):
        projected = SparseProjection(SIZE, seed).project(0, given)
        assert projected.shape == (40, SIZE)
        errors.append((projected @ projected.T).numpy() - exact)
    # Of unit vectors: at most (1 + <x, y>^2) / K, see the module; 200 different pairs and five seeds leave little room.
    share = np.stack(errors) ** 2 / ((1 + exact**2) / SIZE)
    upper = np.triu_indices(40, 1)
    assert 0.5 < share[:, upper[0], upper[1]].mean() < 1.3
    assert abs(np.stack(errors)[:, upper[0], upper[1]].mean()) < 0.01


def test_the_bound_catches_signs_that_are_all_alike(monkeypatch) -> None:
    right = SparseProjection._table

    def without_signs(self, *arguments):
        coordinates, starts, signs = right(self, *arguments)
        return coordinates, starts, signs.abs()

    monkeypatch.setattr(SparseProjection, "_table", without_signs)
    given = vectors(2).abs()
    projected = SparseProjection(SIZE, 0).project(0, given)
    assert float(projected[0] @ projected[1]) > 2 * float(given[0] @ given[1])


def test_blocks_add_up_whatever_their_borders() -> None:
    given = vectors(3)
    whole = SparseProjection(64, 5).project(0, given)
    projection = SparseProjection(64, 5)
    parts = [projection.project(first, given[:, first:last]) for first, last in ((0, 7), (7, 5000), (5000, 20_000))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)
    again = projection.project(7, given[:, 7:5000])
    assert torch.equal(again, parts[1])


def test_seeds_give_other_projections() -> None:
    given = vectors(1)
    assert not torch.allclose(SparseProjection(64, 0).project(0, given), SparseProjection(64, 1).project(0, given))


def test_the_generator_is_splitmix64() -> None:
    """Against whole numbers of any size, and the first output for seed 0 that its authors give."""
    mask = (1 << 64) - 1

    def plain(counter: int, seed: int) -> int:
        z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert plain(0, 0) == 0xE220A8397B1DCDAF
    for seed in (0, 12345, -(1 << 62)):
        counters = [0, 1, 2, 1 << 20, (1 << 40) + 3]
        found = [value & mask for value in splitmix64(torch.tensor(counters), seed).tolist()]
        assert found == [plain(counter, seed) for counter in counters]


def test_a_gradient_that_is_zero_or_not_finite_has_no_direction_and_leaves_the_others_alone() -> None:
    given = vectors(4)
    broken = given.clone()
    broken[1, 5], broken[2] = torch.nan, 0.0
    projection = SparseProjection(64, 0)

    def parts(values: torch.Tensor):
        yield "a", values[:, :9000]
        yield "b", values[:, 9000:]

    found, whole = projected_rows(parts(broken), projection), projected_rows(parts(given), projection)
    assert found[[1, 2]].isnan().all()
    assert torch.equal(found[[0, 3]], whole[[0, 3]])
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))


def test_products_are_the_dot_product_and_the_length() -> None:
    given = vectors(4)
    target = {"a": given[3, :9000], "b": given[3, 9000:]}
    found = target_products(iter((("a", given[:3, :9000]), ("b", given[:3, 9000:]))), target)
    np.testing.assert_allclose(found[:, 0], (given[:3].double() @ given[3].double()).numpy(), atol=1e-6)
    np.testing.assert_allclose(found[:, 1], given[:3].double().norm(dim=1).numpy(), atol=1e-6)


def test_sums_of_gradients_and_of_their_directions() -> None:
    given = vectors(3) * torch.tensor([[1.0], [20.0], [0.1]])

    def parts(values: torch.Tensor):
        yield "a", values[:, :9000]
        yield "b", values[:, 9000:]

    plain, unit = summed_rows(parts(given), unit=False), summed_rows(parts(given), unit=True)
    assert plain is not None and unit is not None
    torch.testing.assert_close(plain, given.sum(dim=0))
    torch.testing.assert_close(unit, vectors(3).sum(dim=0))
    given[1] = 0.0
    assert summed_rows(parts(given), unit=True) is None
    given[1, 12_000] = torch.inf
    assert summed_rows(parts(given), unit=False) is None
