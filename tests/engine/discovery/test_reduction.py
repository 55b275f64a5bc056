"""Randomised principal components on a Dask cluster, against NumPy's decompositions of the whole matrix."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import reduce
from typing import Any

import dask.array as da
import numpy as np
import pytest

from pairtrace.engine.dask_cluster import discovery_client
from pairtrace.engine.discovery.chunk_tasks import chosen_rows, sum_chunks
from pairtrace.engine.discovery.reduction import Reduction, fit_reduction, reduce_rows
from pairtrace.errors import ConfigError, DataError
from tests.engine.clusters import RunningCluster, running_cluster

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers, of which the last tests kill one, and the scheduler."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[Any]:
    with discovery_client(cluster.address) as found:
        yield found


def spread_rows(width: int, count: int = 500, seed: int = 0) -> np.ndarray:
    """Rows float32 of any length whose directions lie along a few axes: the spectrum falls by a third per axis."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0]
    scales = 1.5 ** -np.arange(width)
    rows = (rng.normal(size=(count, width)) + 0.3) * scales @ axes.T
    return np.asarray(rows * np.exp(rng.normal(size=(count, 1))), np.float32)


def as_dask(rows: np.ndarray, height: int = 128) -> Any:
    return da.from_array(rows, chunks=(height, rows.shape[1]))


def unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    result: np.ndarray = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return result


def bits(reduction: Reduction) -> tuple[bytes, bytes, float]:
    return reduction.components.tobytes(), reduction.share.tobytes(), reduction.mean_cosine


class Told:
    """Progress that runs something when the first chunk is done, and counts."""

    def __init__(self, action: Any = None) -> None:
        self.action, self.total, self.done = action, 0, 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.total += total or 0

    def advance(self, done: int, **figures: float) -> None:
        self.done += done
        if self.action is not None:
            action, self.action = self.action, None
            action()

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("width", [40, 200])
def test_components_are_those_of_the_whole_matrix(client: Any, width: int, dtype: str) -> None:
    """Width 40 is summed as a whole, width 200 is sketched with 13 columns."""
    rows = spread_rows(width).astype(dtype)
    progress = Told()
    found = fit_reduction(as_dask(rows), 3, seed=0, client=client, progress=progress)
    assert progress.done == progress.total == len(rows) * (1 if width == 40 else 5)
    points = unit(rows)
    _, values, axes = np.linalg.svd(points, full_matrices=False)
    np.testing.assert_allclose(found.share, values[:3] ** 2 / len(rows), rtol=1e-5)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(3), atol=1e-6)
    # Cosines of the angles between single components, not only between the spaces.
    np.testing.assert_allclose(np.abs(found.components @ axes[:3].T), np.eye(3), atol=1e-4)
    assert found.mean_cosine == pytest.approx((points @ points.T).mean(), rel=1e-5)
    assert (found.components[np.arange(3), np.abs(found.components).argmax(axis=1)] > 0).all()


def test_projected_rows_have_length_one_and_say_what_was_lost(client: Any) -> None:
    rows = spread_rows(40)
    found = fit_reduction(as_dask(rows), 3, seed=0, client=client)
    progress = Told()
    reduced = reduce_rows(as_dask(rows), found, client, progress)
    assert progress.done == progress.total == len(rows)
    inside = unit(rows) @ found.components.T.astype(np.float64)
    lengths = np.linalg.norm(inside, axis=1)
    np.testing.assert_allclose(reduced.points, inside / lengths[:, None], atol=1e-5)
    np.testing.assert_allclose(reduced.kept, lengths, atol=1e-6)
    assert 0.1 < reduced.kept.min() < 0.9 < reduced.kept.max() <= 1
    np.testing.assert_allclose(np.square(reduced.kept).mean(), found.share.sum(), rtol=1e-4)
    np.testing.assert_array_equal(found.apply(rows[:128]), reduced.points[:128])


def test_a_row_longer_than_the_others_weighs_no_more(client: Any) -> None:
    rows = spread_rows(40)
    scaled = rows * np.float32(2) ** np.random.default_rng(1).integers(-20, 20, size=(len(rows), 1))
    found, other = (fit_reduction(as_dask(some), 3, seed=0, client=client) for some in (rows, scaled))
    assert bits(found) == bits(other)


def test_rows_without_direction_are_left_out(client: Any) -> None:
    rows = spread_rows(40)
    broken = rows.copy()
    broken[[3, 130, 131, 499]] = [[0.0], [np.nan], [np.inf], [-np.inf]]
    broken[200:300] = 0
    usable = np.setdiff1d(np.arange(500), [3, 130, 131, 499, *range(200, 300)])
    found = fit_reduction(as_dask(broken), 3, seed=0, client=client)
    expected = fit_reduction(as_dask(rows[usable]), 3, seed=0, client=client)
    np.testing.assert_allclose(found.components, expected.components, atol=1e-5)
    assert found.mean_cosine == pytest.approx(expected.mean_cosine)
    reduced = reduce_rows(as_dask(broken), found, client)
    assert np.flatnonzero(np.isfinite(reduced.kept)).tolist() == usable.tolist()
    assert np.isnan(reduced.points[[3, 130, 250]]).all() and np.isfinite(reduced.points[usable]).all()


def test_sums_are_added_in_the_order_of_the_chunks(client: Any) -> None:
    """Values of any size, so that another order gives other bits."""
    values = np.random.default_rng(0).normal(size=(20, 9)) * 10.0 ** np.random.default_rng(1).integers(-9, 9, (20, 9))
    values[:, 0] = np.arange(20)

    def late(rows: np.ndarray, *, given: int) -> tuple[int, np.ndarray]:
        time.sleep(0.01 * np.random.default_rng([given, int(rows[0, 0])]).integers(5))
        return len(rows), rows.sum(axis=0)

    expected = [values[start : start + 8] for start in range(0, 20, 8)]
    levels = [reduce(np.add, group) for group in expected]
    for seed in range(3):
        progress = Told()
        count, total = sum_chunks(da.from_array(values, chunks=(1, 9)), late, seed, client, progress)
        assert count == progress.done == 20
        assert total.tobytes() == reduce(np.add, levels).tobytes()


def test_a_seed_decides_all_bits(client: Any) -> None:
    rows = as_dask(spread_rows(200, count=700), 64)
    found, same, other = (bits(fit_reduction(rows, 3, seed=seed, client=client)) for seed in (0, 0, 1))
    assert found == same != other


@pytest.mark.parametrize(("count", "width", "wanted", "expected"), [(500, 8, 50, 8), (5, 40, 50, 5), (2, 40, 3, 2)])
def test_there_are_no_more_components_than_directions(
    client: Any, count: int, width: int, wanted: int, expected: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    found = fit_reduction(as_dask(rows), wanted, seed=0, client=client)
    assert found.components.shape == (expected, width)
    assert found.share.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(reduce_rows(as_dask(rows), found, client).kept, 1, atol=1e-5)


def test_what_cannot_be_reduced_is_an_error(client: Any) -> None:
    same = np.outer(np.arange(1, 301), np.arange(1, 41)).astype(np.float32)
    with pytest.raises(DataError, match=r"all 300 rows .* have the same one"):
        fit_reduction(as_dask(same), 3, seed=0, client=client)
    with pytest.raises(DataError, match="no row has a direction"):
        fit_reduction(as_dask(same * 0), 3, seed=0, client=client)
    with pytest.raises(ConfigError, match="0 components"):
        fit_reduction(as_dask(same), 0, seed=0, client=client)
    opposite = fit_reduction(as_dask(same * np.where(np.arange(300) % 2, 1, -1)[:, None]), 3, seed=0, client=client)
    assert len(opposite.components) == 1


def test_chosen_rows_are_those_of_a_mask(client: Any) -> None:
    rows = spread_rows(40)
    chosen = np.random.default_rng(3).random(500) < 0.3
    chosen[128:256] = False
    chosen[256:384] = True
    picked = chosen_rows(as_dask(rows), chosen)
    assert picked.chunks[0][1:3] == (0, 128)
    np.testing.assert_array_equal(picked.compute(scheduler="sync"), rows[chosen])
    found = fit_reduction(picked, 3, seed=0, client=client)
    expected = fit_reduction(as_dask(rows[chosen]), 3, seed=0, client=client)
    np.testing.assert_allclose(found.components, expected.components, atol=1e-5)


class Recorded:
    """A client that remembers how many tasks it was given."""

    def __init__(self, client: Any) -> None:
        self.client, self.scheduler, self.loop = client, client.scheduler, client.loop
        self.tasks: list[int] = []

    def get(self, graph: dict[Any, Any], keys: list[Any], **options: Any) -> Any:
        from dask._task_spec import DataNode

        self.tasks.append(sum(not isinstance(task, DataNode) for task in graph.values()))
        return self.client.get(graph, keys, **options)


def test_rows_are_used_in_the_task_that_opens_them(client: Any) -> None:
    """No task hands rows to another one: a pass is one task per chunk and those that add the sums up."""

    def opened(block_id: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(block_id[0]).normal(size=(16, 200)).astype(np.float32)

    rows = da.map_blocks(
        opened, chunks=((16,) * 20, (200,)), dtype=np.float32, meta=np.empty((0, 0), np.float32), name="opened"
    )
    recorded = Recorded(client)
    picked = chosen_rows(rows, np.arange(320) % 3 > 0)
    reduce_rows(picked, fit_reduction(picked, 3, seed=0, client=recorded), recorded)
    assert recorded.tasks == [20 + 3 + 1] * 5 + [20]


def test_a_killed_worker_changes_nothing(cluster: RunningCluster, client: Any) -> None:
    rows = as_dask(spread_rows(200), 32)
    expected = fit_reduction(rows, 3, seed=0, client=client)
    points = reduce_rows(rows, expected, client).points
    progress = Told(lambda: cluster.workers[0].send_signal(signal.SIGKILL))
    found = fit_reduction(rows, 3, seed=0, client=client, progress=progress)
    assert cluster.workers[0].wait(10) == -signal.SIGKILL and progress.done == progress.total
    assert bits(found) == bits(expected)
    assert reduce_rows(rows, found, client).points.tobytes() == points.tobytes()


def test_a_lost_scheduler_is_a_clear_error(cluster: RunningCluster) -> None:
    progress = Told(cluster.scheduler.kill)
    message = r"Dask cluster at tcp://.* failed: .*lost the connection to the scheduler.*; run the same command again"
    with pytest.raises(ConfigError, match=message), discovery_client(cluster.address) as client:
        fit_reduction(as_dask(spread_rows(200), 16), 3, seed=0, client=client, progress=progress)
