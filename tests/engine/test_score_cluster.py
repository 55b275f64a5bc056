"""Scoring on a Dask cluster of two processes gives the bits of scoring here."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster

from pairtrace.engine import dask_cluster, score_cluster
from pairtrace.engine.directions import load_directions
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.engine.score_blocks import Scorer, local_scores
from pairtrace.errors import ConfigError, MissingDependencyError, StoreDamagedError, StoreError
from pairtrace.store.reader import ActivationStore
from tests.engine.clusters import kill_a_worker, running_cluster
from tests.engine.small_store import SmallStore, any_values, make_store
from tests.engine.test_score import behavior_file

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with two workers."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), rows=1000)


@pytest.fixture(scope="module")
def behaviors(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("behaviors") / "b.safetensors"
    vectors = [(f"v{number}", 5, any_values(number, 24)) for number in range(9)]
    return behavior_file(path, *vectors, ("bank", 5, any_values(99, 7, 24)))


def scores_of(out: Path, **options: Any) -> dict[str, bytes]:
    score(ScoreConfig(out=str(out), **options))
    table = pq.read_table(out)
    return {name: str(table[name].to_pylist()).encode() for name in table.column_names}


class Counted:
    def __init__(self) -> None:
        self.done = 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        assert (stage, total, unit) == ("score", 1000, "pairs")

    def advance(self, done: int, **figures: float) -> None:
        self.done += done

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("keep_top", [None, 5])
def test_the_cluster_gives_the_same_bits(
    scheduler: str, store: SmallStore, behaviors: str, tmp_path: Path, keep_top: int | None
) -> None:
    options = {"store": store.path, "directions": (behaviors,), "keep_top": keep_top}
    here = scores_of(tmp_path / "here.parquet", **options)
    there = scores_of(tmp_path / "there.parquet", scheduler=scheduler, **options)
    assert here == there and len(here) == 3 + 3 * 10


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_dtype_and_a_gap(scheduler: str, behaviors: str, tmp_path: Path, dtype: str) -> None:
    small = make_store(tmp_path, dtype=dtype, skip_shards=(1,))
    options = {"store": small.path, "directions": (behaviors,), "allow_incomplete": True}
    here = scores_of(tmp_path / "here.parquet", **options)
    assert scores_of(tmp_path / "there.parquet", scheduler=scheduler, **options) == here


def test_progress_counts_every_pair(scheduler: str, store: SmallStore, behaviors: str, tmp_path: Path) -> None:
    progress = Counted()
    config = ScoreConfig(
        store=store.path, directions=(behaviors,), out=str(tmp_path / "s.parquet"), scheduler=scheduler
    )
    summary = score(config, progress)
    assert progress.done == summary.rows == 1000


def test_a_killed_worker_changes_nothing(scheduler: str, store: SmallStore, behaviors: str) -> None:
    opened = ActivationStore.open(store.path)
    scorer = Scorer.of(load_directions(behaviors, layer=5), "float16")
    expected = list(local_scores(opened, 5, scorer, checksum=True))
    blocks = score_cluster.cluster_scores(scheduler, opened, 5, scorer, checksum=True)
    found = [next(blocks)]
    kill_a_worker(scheduler)
    found.extend(blocks)
    assert [start for start, _ in found] == [start for start, _ in expected]
    for (_, there), (_, here) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(there.view(np.uint32), here.view(np.uint32))


def test_a_damaged_shard_is_named(scheduler: str, behaviors: str, tmp_path: Path) -> None:
    small = make_store(tmp_path)
    chunk = Path(small.path) / "diff/5/c/2/0"
    whole = chunk.read_bytes()
    for harmed in (whole[:-8], None, bytes([whole[0] ^ 1]) + whole[1:]):
        chunk.unlink()
        if harmed is not None:
            chunk.write_bytes(harmed)
        with pytest.raises(StoreDamagedError, match=r"array diff/5, shard 2 \(rows 128 to 191\)"):
            scores_of(
                tmp_path / "s.parquet",
                store=small.path,
                directions=(behaviors,),
                scheduler=scheduler,
            )
        chunk.write_bytes(whole)


def test_a_worker_that_cannot_see_the_store_says_so(
    scheduler: str, store: SmallStore, behaviors: str, tmp_path: Path
) -> None:
    opened = ActivationStore.open(store.path)
    opened.path = str(tmp_path / "only-here.zarr")
    scorer = Scorer.of(load_directions(behaviors, layer=5), "float16")
    with pytest.raises(StoreError, match=r"Dask worker at tcp.* cannot open the store: .*only-here.*has to see it"):
        list(score_cluster.cluster_scores(scheduler, opened, 5, scorer, checksum=True))


def test_addresses_where_nothing_answers(
    store: SmallStore, behaviors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "nonsense://x:1"):
        with pytest.raises(ConfigError, match=f"no Dask scheduler answers at '{address}' within 1 s"):
            scores_of(tmp_path / "s.parquet", store=store.path, directions=(behaviors,), scheduler=address)
    assert not (tmp_path / "s.parquet").exists()


def test_a_scheduler_without_workers(store: SmallStore, behaviors: str, tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None, protocol="tcp") as empty,
        pytest.raises(ConfigError, match="has no workers; start some with: dask worker"),
    ):
        scores_of(tmp_path / "s.parquet", store=store.path, directions=(behaviors,), scheduler=empty.scheduler_address)


def test_another_version_on_a_worker_is_refused(
    scheduler: str, store: SmallStore, behaviors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "__version__", "99.0")
    with pytest.raises(ConfigError, match=r"Dask worker at tcp.* has another pairtrace \(.*\) than this one \(99.0\)"):
        scores_of(tmp_path / "s.parquet", store=store.path, directions=(behaviors,), scheduler=scheduler)


def test_without_dask_the_extra_is_named(
    store: SmallStore, behaviors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = builtins.__import__

    def without_dask(name: str, *args: Any) -> Any:
        if name.startswith("distributed"):
            raise ImportError(name)
        return honest(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_dask)
    with pytest.raises(MissingDependencyError, match=r"--scheduler needs .*pairtrace\[discover\]"):
        scores_of(tmp_path / "s.parquet", store=store.path, directions=(behaviors,), scheduler="tcp://127.0.0.1:1")


def test_scoring_here_loads_no_dask() -> None:
    code = "import sys, pairtrace.engine.score; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"dask", "distributed"} & set(loaded)
