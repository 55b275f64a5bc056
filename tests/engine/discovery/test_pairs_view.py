"""Kinds of pair planted in a store come out as clusters, whatever holds the store and whoever reads it."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from sklearn.metrics import adjusted_rand_score

from pairtrace.engine import dask_cluster
from pairtrace.engine.discovery import pairs_view
from pairtrace.engine.discovery.description import DescriptionConfig
from pairtrace.engine.discovery.pairs_view import PairsConfig, default_min_cluster_size, discover_pairs
from pairtrace.engine.discovery.product import Discovered, read_product
from pairtrace.engine.discovery.stability import StabilityConfig
from pairtrace.engine.ranking import top
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import ConfigError, DataError, LayerError, StoreError, StoreIncompleteError, StoreLockedError
from pairtrace.store.lock import WriterLock
from pairtrace.store.reader import ActivationStore
from tests.engine.clusters import RunningCluster, running_cluster
from tests.engine.small_store import SmallStore, make_store

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

ROWS, WIDTH = 300, 64
# Kind of every row, in an order that no shard follows; 3 is noise.
KINDS = np.random.default_rng(5).permutation(np.repeat([0, 1, 2, 3], [100, 80, 60, 60]))
QUICK = DescriptionConfig(stability=StabilityConfig(runs=0))


def planted() -> np.ndarray:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    rows = rng.normal(size=(ROWS, WIDTH))
    members = KINDS < 3
    rows[members] = axes[KINDS[members]] + 0.01 * rows[members]
    return np.asarray(rows * np.exp(rng.normal(size=(ROWS, 1))), np.float32)


def planted_store(root: Path, **options: Any) -> SmallStore:
    sources = [("web", "code", "chat", "other")[kind] for kind in KINDS]
    return make_store(root, rows=ROWS, width=WIDTH, layers=(5,), sources=sources, vectors=planted(), **options)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers, of which the last tests kill one, and the scheduler."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return planted_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def config(store: SmallStore, cluster: RunningCluster, tmp_path: Path) -> PairsConfig:
    return PairsConfig(
        store=store.path, out=str(tmp_path / "kinds"), components=30, scheduler=cluster.address, description=QUICK
    )


def bits(found: Discovered) -> tuple[Any, ...]:
    arrays = (found.items, found.labels, found.probabilities, found.cosines, found.directions)
    return (*(values.tobytes() for values in arrays), found.clusters)


def agrees(found: Discovered) -> bool:
    """Every cluster is one kind, and hardly a member or a row of noise is in the wrong place."""
    kinds = KINDS[found.items]
    clustered = found.labels >= 0
    both = clustered & (kinds < 3)
    return bool(
        len(found.clusters) == 3
        and adjusted_rand_score(kinds[both], found.labels[both]) == 1
        and clustered[kinds < 3].mean() > 0.95
        and clustered[kinds == 3].mean() < 0.3
    )


class At:
    """Progress that runs something when the first rows of a stage are done."""

    def __init__(self, stage: str, action: Any) -> None:
        self.stage, self.action, self.now = stage, action, ""
        self.totals: dict[str, int] = {}

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.now = stage

    def advance(self, done: int, **figures: float) -> None:
        self.totals[self.now] = self.totals.get(self.now, 0) + done
        if self.now == self.stage and self.action is not None:
            action, self.action = self.action, None
            action()

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_planted_kinds_are_found(config: PairsConfig, tmp_path: Path, dtype: str) -> None:
    small = planted_store(tmp_path, dtype=dtype)
    found = discover_pairs(replace(config, store=small.path))
    assert agrees(found)
    assert [len(found.labels[found.labels == number]) for number in range(3)] == [c.size for c in found.clusters]
    assert [cluster.enrichment[0].value for cluster in found.clusters] == ["web", "code", "chat"]
    assert found.details["rows"] == {
        "rows": 300, "used": 297, "undefined": 1, "not_finite": 0, "not_sampled": 0, "quarantined": 2, "missing": 0,
    }  # fmt: skip
    assert not {7, 11, 130} & set(found.items.tolist())
    kept = found.details["reduction"]["kept"]
    assert kept["noise"][1] < 0.95 < kept["members"][0]
    assert bits(read_product(config.out)) == bits(found)
    assert (tmp_path / "kinds.costs.jsonl").exists()


def test_rows_that_are_not_finite_are_told(
    config: PairsConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = planted_store(tmp_path / "damaged", quarantined=())
    stored: Any = zarr.open_group(small.path, mode="r+")["diff/5"]
    stored[20, :], stored[70, 3] = np.nan, np.inf
    found = discover_pairs(replace(config, store=small.path))
    rows = found.details["rows"]
    assert (rows["used"], rows["undefined"], rows["not_finite"]) == (297, 1, 2)
    assert "2 of 300 pairs hold NaN or infinity at layer 5" in caplog.text
    assert f"pairtrace store verify {small.path}" in caplog.text


def test_a_cluster_is_a_direction_for_scoring(config: PairsConfig, store: SmallStore, tmp_path: Path) -> None:
    found = discover_pairs(config)
    scores = str(tmp_path / "scores.parquet")
    score(ScoreConfig(store=store.path, directions=(f"{config.out}/directions.safetensors",), out=scores))
    planted = set(found.items[KINDS[found.items] == 1].tolist())
    assert {pair.row for pair in top(scores, behavior="cluster-1", k=len(planted), ends="top")} == planted


def test_a_second_run_does_not_reduce_again(config: PairsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = discover_pairs(config)
    assert not first.details["reduction"]["reused"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the store is reduced again")

    with monkeypatch.context() as patched:
        patched.setattr(pairs_view, "fit_reduction", never)
        again = discover_pairs(config)
        assert again.details["reduction"]["reused"] and bits(again) == bits(first)
        larger = discover_pairs(replace(config, min_cluster_size=70))
        assert [cluster.size >= 70 for cluster in larger.clusters] == [True, True]
        for other in (replace(config, components=29), replace(config, sample=200), replace(config, seed=1)):
            with pytest.raises(AssertionError, match="reduced again"):
                discover_pairs(other)
    assert read_product(config.out).settings["min_cluster_size"] == 70


def test_damaged_reduced_rows_are_made_again(config: PairsConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = discover_pairs(config)
    path = Path(config.out) / "reduced.safetensors"
    whole = path.read_bytes()
    assert path.stat().st_mode == (path.parent / "clusters.json").stat().st_mode
    for harmed in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"nothing"):
        path.write_bytes(harmed)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pairtrace"):
            assert bits(discover_pairs(config)) == bits(first)
        assert any("the store is read again" in text for text in caplog.messages)
        assert path.read_bytes() == whole


def test_an_interrupted_run_leaves_no_product_and_goes_on(
    config: PairsConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = discover_pairs(replace(config, out=str(tmp_path / "whole")))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pairs_view, "describe", interrupted)
        discover_pairs(config)
    assert {path.name for path in Path(config.out).iterdir()} == {"reduced.safetensors", "status"}
    again = discover_pairs(config)
    assert again.details["reduction"]["reused"] and bits(again) == bits(whole)


def test_a_sample_is_drawn_by_its_seed(config: PairsConfig) -> None:
    found = discover_pairs(replace(config, sample=200))
    assert found.details["rows"]["not_sampled"] == 98
    assert len(found.items) == 200 - found.details["rows"]["undefined"]
    assert (np.diff(found.items) > 0).all() and agrees(found)
    other = discover_pairs(replace(config, sample=200, seed=1))
    assert 0 < len(np.intersect1d(other.items, found.items)) < len(found.items)
    assert discover_pairs(replace(config, sample=10_000)).details["rows"]["not_sampled"] == 0


def test_an_incomplete_store_is_refused_unless_allowed(config: PairsConfig, tmp_path: Path) -> None:
    small = planted_store(tmp_path, skip_shards=(1,))
    with pytest.raises(StoreIncompleteError, match="64 of 300 rows are missing"):
        discover_pairs(replace(config, store=small.path))
    found = discover_pairs(replace(config, store=small.path, allow_incomplete=True))
    assert agrees(found) and not set(range(64, 128)) & set(found.items.tolist())
    assert found.details["rows"]["missing"] == 64 and found.details["rows"]["used"] == 233


def test_what_cannot_be_clustered_is_refused_before_any_work(
    config: PairsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 1)
    file = tmp_path / "file"
    file.touch()
    for changed, error, message in (
        ({"min_cluster_size": 299}, DataError, r"298 pairs of .* can be clustered, but .* --min-cluster-size 299"),
        ({"sample": 10}, DataError, r"10 pairs .* --min-cluster-size 15"),
        ({"layer": 4}, LayerError, r"layer 4 is not in .*\[5\]"),
        ({"out": str(file)}, ConfigError, "which is a file"),
        ({"scheduler": "tcp://127.0.0.1:1"}, ConfigError, "no Dask scheduler answers"),
        ({"description": replace(QUICK, data=str(file))}, DataError, "file"),
        ({"description": replace(QUICK, metadata=("nosuch",))}, ConfigError, "no column 'nosuch' in the data"),
    ):
        with pytest.raises(error, match=message):
            discover_pairs(replace(config, **changed))
    for name, value in (
        *(("components", 0), ("sample", 0), ("method", "x"), ("min_samples", 0)),
        *(("min_cluster_size", 1), ("min_cluster_size", 0)),
    ):
        with pytest.raises(ConfigError):
            replace(config, **{name: value})
    assert not Path(config.out).exists()


def test_workers_that_cannot_see_the_store_say_so(config: PairsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActivationStore, "address", "/only/here.zarr")
    with pytest.raises(StoreError, match=r"Dask worker at tcp.* cannot open the store: .*only/here.*has to see it"):
        discover_pairs(config)


def test_a_directory_belongs_to_one_run_at_a_time(config: PairsConfig) -> None:
    Path(config.out).mkdir()
    with WriterLock(Path(config.out)), pytest.raises(StoreLockedError, match="is being written by process"):
        discover_pairs(config)


def test_rows_that_are_all_alike_are_an_error(config: PairsConfig, tmp_path: Path) -> None:
    small = make_store(tmp_path, rows=100, layers=(5,), quarantined=(), zero=(3,), vectors=np.ones((100, 24)))
    with pytest.raises(DataError, match=r"all 99 rows .* have the same one"):
        discover_pairs(replace(config, store=small.path))


def test_one_group_alone_is_no_cluster(config: PairsConfig, tmp_path: Path) -> None:
    vectors = np.ones((100, 24)) + 0.1 * np.random.default_rng(0).normal(size=(100, 24))
    small = make_store(tmp_path, rows=100, layers=(5,), quarantined=(), zero=(), vectors=vectors)
    found = discover_pairs(replace(config, store=small.path))
    assert found.clusters == () and (found.labels == -1).all()
    assert found.details["reduction"]["kept"]["members"] is None
    assert read_product(config.out).clusters == ()


@pytest.mark.parametrize(("rows", "size"), [(20, 15), (15_999, 15), (378_341, 378), (1_000_000, 1000)])
def test_the_default_size_follows_the_number_of_rows(rows: int, size: int) -> None:
    assert default_min_cluster_size(rows) == size


@pytest.mark.parametrize("killed", ["principal components", "mean directions"])
def test_a_killed_worker_changes_nothing(
    config: PairsConfig, cluster: RunningCluster, tmp_path: Path, killed: str
) -> None:
    """The first case kills one of the two workers, the second works with the one that is left."""
    calm = discover_pairs(replace(config, out=str(tmp_path / "calm")))
    alive = [worker for worker in cluster.workers if worker.poll() is None]
    action = (lambda: alive[0].send_signal(signal.SIGKILL)) if len(alive) > 1 else (lambda: None)
    progress = At(killed, action)
    assert bits(discover_pairs(config, progress)) == bits(calm)
    assert progress.action is None and progress.totals["reduce"] == 298
    assert sum(worker.poll() is None for worker in cluster.workers) == 1


def test_a_lost_scheduler_is_an_error_after_which_the_work_goes_on(
    config: PairsConfig, cluster: RunningCluster, tmp_path: Path
) -> None:
    whole = discover_pairs(replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(ConfigError, match=r"Dask cluster at tcp://.* failed: .*; run the same command again"):
        discover_pairs(config, At("mean directions", cluster.scheduler.kill))
    assert not (Path(config.out) / "clusters.json").exists()
    again = discover_pairs(replace(config, scheduler=None))  # processes here
    assert again.details["reduction"]["reused"] and bits(again) == bits(whole)
    content = json.loads((Path(config.out) / "clusters.json").read_text())
    assert content["settings"]["scheduler"] is None
