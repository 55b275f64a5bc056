"""Extraction on a Dask cluster of processes gives the bytes of extraction here, whoever is killed meanwhile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from typer.testing import CliRunner

from pairtrace.commands.extraction import app
from pairtrace.engine import extract_cluster
from pairtrace.engine.cost import read_costs
from pairtrace.engine.extract import ExtractConfig, ExtractSummary, extract
from pairtrace.errors import ConfigError, StoreDamagedError, StoreLockedError
from pairtrace.store.lock import WriterLock
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from tests.engine.clusters import RunningCluster, kill_a_worker, running_cluster
from tests.engine.extraction import contents, pair, write_rows
from tests.engine.shard_runs import damage
from tests.models import HH

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data"),
]

# Repeated pairs within a shard of 4 and across shards (which are under way together), a row that cannot be used, and
# rows that an older store has.
ROWS = [pair(f"question {i % 97}", f"yes {i % 97}", f"no {i % 97}") for i in range(120)]
ROWS[9] = ROWS[8]
ROWS[5], ROWS[13] = ROWS[2], ROWS[9]
ROWS[30] = pair("question", "", "no")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers, of which one declares a GPU (as far as Dask knows)."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), first=("--resources", "GPU=1")) as running:
        yield running


@pytest.fixture(scope="module")
def here(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractConfig:
    """Settings of a run, whose store was made without a cluster; it reuses the rows of an older store."""
    root = tmp_path_factory.mktemp("here")
    old = ExtractConfig(
        data=str(write_rows(root / "old.jsonl", ROWS[40:44])), model=str(model), layers=(2, 4), store=str(root / "old"),
        sides=True, device="cpu", shard_rows=4, fsync=False,
    )  # fmt: skip
    extract(old)
    data = str(write_rows(root / "pairs.jsonl", ROWS))
    config = replace(old, data=data, store=str(root / "acts.zarr"), reuse=(old.store,))
    extract(config)
    return config


class Watched:
    """Progress that does something at the first shard."""

    def __init__(self, action: Callable[[], None] = lambda: None) -> None:
        self.action = action
        self.seen: list[tuple[str, int | None, str]] = []
        self.done = 0

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.seen.append((stage, total, unit))

    def advance(self, done: int, **_: float) -> None:
        self.done += done
        if self.done == 1:
            self.action()

    def finish(self) -> None:
        pass


def assert_same_store(path: str, here: ExtractConfig) -> None:
    assert contents(Path(path)) == contents(Path(here.store))
    assert verify(path).ok, "and nothing of what was staged is left"


def plain(summary: ExtractSummary) -> dict[str, Any]:
    timed = ("store", "seconds", "pairs_per_second", "tokens_per_second", "workers")
    return {name: value for name, value in summary.to_dict().items() if name not in timed}


def test_the_cluster_gives_the_same_store(cluster: RunningCluster, here: ExtractConfig, tmp_path: Path) -> None:
    local = extract(replace(here, store=str(tmp_path / "local.zarr")))
    progress = Watched()
    there = replace(here, store=str(tmp_path / "there.zarr"), scheduler=cluster.address)
    summary = extract(there, progress)
    assert_same_store(there.store, here)
    assert plain(summary) == plain(local)
    assert summary.reused > 4 and summary.quarantined == 1, "the case has copies and a quarantined row"
    assert summary.workers == 2
    assert progress.seen == [("extract", 30, "shards")] and progress.done == 30
    mine, theirs = (read_costs(tmp_path / f"{name}.costs.jsonl")[-1] for name in ("local", "there"))
    assert theirs.model_tokens == mine.model_tokens == summary.tokens
    assert theirs.flops == pytest.approx(mine.flops)
    assert (theirs.device, theirs.devices, theirs.extra) == ("cpu", 2, {"scheduler": cluster.address})
    assert theirs.device_seconds > 0


def test_only_what_is_missing_is_computed_and_only_by_workers_with_a_gpu(
    cluster: RunningCluster, here: ExtractConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "acts.zarr"
    shutil.copytree(here.store, store)
    # One without a mark, one that is damaged, and both have pairs that later shards repeat.
    (store / "status/c/2").unlink()
    (store / "norm/4/c/5").unlink()
    config = replace(here, store=str(store), scheduler=cluster.address, device="auto")
    with caplog.at_level("INFO"):
        summary = extract(config)
    assert "1 of 2 workers declare the resource GPU" in caplog.text
    assert (summary.resumed, summary.computed + summary.reused, summary.workers) == (112, 8, 1)
    assert_same_store(config.store, here)
    again = extract(config)
    assert again.already_complete and again.workers == 0


def test_a_killed_client_and_then_a_killed_worker(cluster: RunningCluster, here: ExtractConfig, tmp_path: Path) -> None:
    store = tmp_path / "acts.zarr"
    start = [sys.executable, "-m", "pairtrace.cli", "extract", here.data]
    command = f"--model {here.model} --layers 2,4 --store {store} --reuse {here.reuse[0]} --sides"
    options = f"--shard-rows 4 --device cpu --no-fsync --scheduler {cluster.address}"
    client = subprocess.Popen([*start, *command.split(), *options.split()], stderr=subprocess.DEVNULL)
    try:
        while len(list(store.glob("status/c/*[0-9]"))) < 2:  # staged marks end in a letter
            assert client.poll() is None, "the client has ended"
            time.sleep(0.002)
    finally:
        client.kill()
        client.wait()
    with Client(cluster.address, set_as_default=False) as other:
        deadline = time.monotonic() + 60
        while any(other.processing().values()):
            assert time.monotonic() < deadline, "the tasks of the killed client go on"
            time.sleep(0.05)
    begun = ActivationStore.open(store, allow_incomplete=True).status()
    assert 8 <= np.count_nonzero(begun) < 120
    whole = contents(Path(here.store))
    marked = [name for name in contents(store) if name.startswith("status/")]
    for shard in (int(name.rpartition("/")[2]) for name in marked):
        of_shard = {name: raw for name, raw in contents(store).items() if f"/c/{shard}" in f"{name}/"}
        assert of_shard.items() <= whole.items()

    config = replace(here, store=str(store), scheduler=cluster.address)
    summary = extract(config, Watched(lambda: kill_a_worker(cluster.address)))
    assert summary.resumed == np.count_nonzero(begun) and summary.computed
    assert_same_store(str(store), here)


def test_a_worker_that_sees_something_else_is_named(
    cluster: RunningCluster, here: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[:-1], pair("another", "yes", "no")])
    honest = extract_cluster.with_absolute_paths
    monkeypatch.setattr(extract_cluster, "with_absolute_paths", lambda config: replace(honest(config), data=str(other)))
    config = replace(here, store=str(tmp_path / "acts.zarr"), scheduler=cluster.address)
    with pytest.raises(ConfigError, match=r"Dask worker at tcp://.* cannot take part: the data at .*other\.jsonl has"):
        extract(config)
    monkeypatch.undo()
    extract(replace(config, scheduler=None))
    assert_same_store(config.store, here)


def test_what_a_worker_finds_damaged_is_told(cluster: RunningCluster, here: ExtractConfig, tmp_path: Path) -> None:
    old = tmp_path / "old.zarr"
    shutil.copytree(here.reuse[0], old)
    damage(old, "diff/4", 0)
    config = replace(here, store=str(tmp_path / "acts.zarr"), reuse=(str(old),), scheduler=cluster.address)
    with pytest.raises(StoreDamagedError, match=r"rows cannot be copied from a store of --reuse: .*diff/4, shard 0"):
        extract(config)


def test_the_store_of_another_writer_is_left_alone(
    cluster: RunningCluster, here: ExtractConfig, tmp_path: Path
) -> None:
    config = replace(here, store=str(tmp_path / "acts.zarr"), scheduler=cluster.address)
    with WriterLock(Path(config.store)), pytest.raises(StoreLockedError, match="is being written by process"):
        extract(config)


def test_a_lost_scheduler_leaves_a_store_to_go_on_with(
    cluster: RunningCluster, here: ExtractConfig, tmp_path: Path
) -> None:
    """The last test with this cluster: it takes it along."""
    config = replace(here, store=str(tmp_path / "acts.zarr"), scheduler=cluster.address)
    with pytest.raises(ConfigError, match=rf"Dask cluster at {cluster.address} failed: .*run the same command again"):
        extract(config, Watched(lambda: os.kill(cluster.scheduler.pid, signal.SIGKILL)))
    summary = extract(replace(config, scheduler=None))
    assert summary.resumed and summary.computed
    assert_same_store(config.store, here)


def test_no_worker_that_can_take_shards(here: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(here, store=str(tmp_path / "acts.zarr"))
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None, protocol="tcp") as empty:
        with pytest.raises(ConfigError, match="has no workers; start some with: dask worker"):
            extract(replace(config, scheduler=empty.scheduler_address))
        assert not Path(config.store).exists()
        monkeypatch.setattr(extract_cluster, "WORKERLESS_SECONDS", 0.2)
        monkeypatch.setattr(extract_cluster, "_LOOK_SECONDS", 0.1)
        with Client(empty, set_as_default=False) as client:
            loop = object.__new__(extract_cluster.ClusterLoop)
            loop.client, loop.config, loop._address = client, config, "tcp://here"
            with pytest.raises(ConfigError, match=r"tcp://here has had no worker .*every finished shard is safe"):
                loop._next_finished([client.submit(abs, 1)])


def test_the_command_takes_the_scheduler(here: ExtractConfig, tmp_path: Path) -> None:
    options = ["--model", here.model, "--layers", "2", "--store", str(tmp_path / "acts.zarr")]
    result = CliRunner().invoke(app, ["extract", here.data, *options, "--scheduler", "nonsense://x:1"])
    with pytest.raises(ConfigError, match="no Dask scheduler answers at 'nonsense://x:1'"):
        raise result.exception or AssertionError(result.output)
    assert not (tmp_path / "acts.zarr").exists()
