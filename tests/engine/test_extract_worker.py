"""One process as a worker of a cluster: one model, one forward at a time, and nothing before all is as it should be."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import numpy as np
import pytest

from pairtrace.engine import extract_worker
from pairtrace.engine.backend import HFBackend, Pooled
from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.extract import ExtractConfig, build_manifest
from pairtrace.engine.extract_messages import ClusterRun, ShardReport, ShardTask
from pairtrace.engine.extract_worker import extract_shard
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.rendering import Renderer
from pairtrace.engine.shards import rendered_digest
from pairtrace.errors import ConfigError
from pairtrace.store.dask_view import store_identity
from pairtrace.store.staging import leave_probe
from pairtrace.store.writer import StoreWriter
from pairtrace.version import __version__
from tests.engine.extraction import pair, write_rows
from tests.models import CHAT_TEMPLATE, HH, make_model, make_tokenizer

pytestmark = pytest.mark.skipif(not HH.is_file(), reason="needs ../shared/data")

ROWS = [pair(f"question {i}", f"yes {i}", f"no {i}") for i in range(16)]
WORKER = "tcp://here:1"


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(address=WORKER))
    yield
    if extract_worker._workspace is not None:
        extract_worker._leave(extract_worker._workspace.run.id)
    extract_worker._left.clear()


@pytest.fixture
def config(model: Path, tmp_path: Path) -> ExtractConfig:
    data = write_rows(tmp_path / "pairs.jsonl", ROWS)
    return ExtractConfig(
        data=str(data), model=str(model), layers=(2, 4), store=str(tmp_path / "acts.zarr"), device="cpu",
        shard_rows=4, fsync=False,
    )  # fmt: skip


def begin(config: ExtractConfig, name: str = "run") -> tuple[ClusterRun, list[ShardTask]]:
    """What a client does before it sends its first shard."""
    source, renderer = config.open_source(), config.load_renderer(config.model)
    with StoreWriter.create_or_resume(config.store, build_manifest(config, source, renderer), fsync=False) as writer:
        identity = store_identity(writer.manifest)
    run = ClusterRun(
        id=name, version=__version__, config=config, identity=identity, reuse=(), probe=leave_probe(config.store)
    )
    return run, [task(source, renderer, index) for index in range(4)]


def task(source: PairSource, renderer: Renderer, index: int) -> ShardTask:
    rendered = renderer.render(list(source.read(4 * index, 4 * index + 4)))
    return ShardTask(index=index, copies=np.empty((0, 3), np.int64), digest=rendered_digest(rendered))


class Watch:
    """Counts the models that are loaded, and how many of them run at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded = self.running = self.most = 0
        self.models: list[HFBackend] = []
        load, pool, counting = HFBackend.load, HFBackend.pool, threading.Lock()

        def counted_load(*args: Any, **options: Any) -> HFBackend:
            self.loaded += 1
            return load(*args, **options)

        def counted_pool(backend: HFBackend, *args: Any) -> Pooled:
            with counting:
                self.running += 1
                self.most = max(self.most, self.running)
            time.sleep(0.02)
            try:
                return pool(backend, *args)
            finally:
                with counting:
                    self.running -= 1

        monkeypatch.setattr(HFBackend, "load", counted_load)
        monkeypatch.setattr(HFBackend, "pool", counted_pool)


class Unlocked:
    """The mutation: a lock that holds nobody back."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def run_in_threads(run: ClusterRun, tasks: list[ShardTask]) -> list[ShardReport]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda task: extract_shard(run, task), tasks))


def test_threads_of_a_worker_share_one_model_and_take_turns(
    config: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    run, tasks = begin(config)
    reports = run_in_threads(run, tasks)
    assert (watch.loaded, watch.most) == (1, 1)
    assert [report.staged.index for report in reports] == [0, 1, 2, 3]
    assert all((report.rows, report.computed, report.worker) == (4, 4, WORKER) for report in reports)
    assert all(report.spent.cost.model_tokens > 0 and report.spent.cost.flops > 0 for report in reports)


def test_the_thread_test_notices_a_missing_lock(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    run, tasks = begin(config)
    workspace = extract_worker._workspace_of(run, WORKER)
    workspace._model = workspace._loaded()
    monkeypatch.setattr(workspace, "_lock", Unlocked())
    with suppress(ConfigError, AssertionError):  # two forwards at once get at each other's segments
        run_in_threads(run, tasks)
    assert watch.most > 1


def test_another_run_takes_the_place_of_the_first(
    config: ExtractConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    first, first_tasks = begin(config, "first")
    second, second_tasks = begin(replace(config, store=str(tmp_path / "second.zarr")), "second")
    extract_shard(first, first_tasks[0])
    old = extract_worker._workspace
    assert old is not None and old._model is not None
    extract_shard(second, second_tasks[0])
    assert old._model is None, "one model at a time"
    extract_shard(first, first_tasks[1])
    assert watch.loaded == 3
    assert old.compute(old.divided(first_tasks[2])) is None, "a thread that was late begins again with the new one"


def test_a_run_that_has_ended_gets_no_model_back(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tasks = begin(config, "ended")
    extract_shard(run, tasks[0])
    workspace = extract_worker._workspace
    extract_worker._leave(run.id)
    assert workspace is not None and workspace._model is None and extract_worker._workspace is None
    with pytest.raises(ConfigError, match="the run ended has ended"):
        extract_shard(run, tasks[1])


def test_an_idle_model_is_let_go_and_loaded_again(config: ExtractConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    run, tasks = begin(config)
    monkeypatch.setattr(extract_worker, "IDLE_SECONDS", 0.05)
    extract_shard(run, tasks[0])
    workspace = extract_worker._workspace
    deadline = time.monotonic() + 20
    while workspace is not None and workspace._model is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(extract_worker, "IDLE_SECONDS", 300.0)
    extract_shard(run, tasks[1])
    assert watch.loaded == 2 and workspace is extract_worker._workspace and workspace._model is not None


def test_what_has_to_be_the_same_on_a_worker(config: ExtractConfig, model: Path, tmp_path: Path) -> None:
    run, _ = begin(config)
    other_data = write_rows(tmp_path / "other.jsonl", [*ROWS[:-1], pair("x", "y", "z")])
    other_model, other_tokenizer = tmp_path / "m", tmp_path / "t"
    shutil.copytree(model, other_tokenizer)
    make_tokenizer(other_model)
    make_model("olmo2", other_model, seed=1)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["strange"])
    tokenizer.save_pretrained(other_tokenizer)
    template = tmp_path / "other.jinja"
    template.write_text(CHAT_TEMPLATE + " ")
    copy, elsewhere = tmp_path / "copy.zarr", tmp_path / "elsewhere.zarr"
    shutil.copytree(config.store, copy, ignore=shutil.ignore_patterns("*.partial"))
    begin(replace(config, store=str(elsewhere), sides=True))
    for changes, message in (
        ({"data": str(other_data)}, r"the data at .*other\.jsonl has the fingerprint \w{12} here, but \w{12}"),
        ({"model": str(other_model)}, r"the model at .*/m has the fingerprint"),
        ({"model": str(other_tokenizer)}, r"the tokenizer of .*/t has the fingerprint"),
        ({"chat_template": str(template)}, r"the chat template has the fingerprint"),
        ({"store": str(copy)}, r"copy\.zarr here is a copy of the store, not the store itself"),
        ({"store": str(elsewhere)}, r"elsewhere\.zarr is another store here"),
        ({"store": str(tmp_path / "nowhere")}, r"nowhere: no such store"),
        ({"data": str(tmp_path / "nothing.jsonl")}, r"there is no file or directory .*nothing\.jsonl"),
        ({"device": "cuda:7"}, r"device 'cuda:7' was asked for"),
    ):
        with pytest.raises(ConfigError, match=rf"Dask worker at {WORKER} cannot take part: .*{message}"):
            extract_worker._join(replace(run, config=replace(config, **changes)), WORKER)
    with pytest.raises(ConfigError, match=rf"cannot take part: it has pairtrace {__version__}, the client 99"):
        extract_worker._join(replace(run, version="99"), WORKER)
    with pytest.raises(ConfigError, match=r"cannot take part: .*elsewhere\.zarr is another store here"):
        extract_worker._join(replace(run, reuse=((str(elsewhere), run.identity),)), WORKER)
    joined = extract_worker._join(run, WORKER)
    assert (joined.device, joined.gpu) == ("cpu", None)


def test_other_tokens_are_never_computed(config: ExtractConfig) -> None:
    run, tasks = begin(config)
    with pytest.raises(ConfigError, match=r"rows 4 to 7 become other tokens on .* than on the client; install"):
        extract_shard(run, replace(tasks[1], digest=tasks[0].digest))
