"""Extraction on an existing Dask cluster: one task per shard, one model per worker.

The client holds the lock of the store, decides which rows are computed and which are copied, and commits the shards
that the workers have staged in the store. Over the connections travel numbers of shards, which rows are copies, and
figures: no text, no activation, no model.

Start a cluster by hand like this, one worker per GPU, all of which see the same paths:

    dask scheduler
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://HOST:8786 --nthreads 1 --resources "GPU=1"
    CUDA_VISIBLE_DEVICES=1 dask worker tcp://HOST:8786 --nthreads 1 --resources "GPU=1"
    pairtrace extract prefs.parquet --model ./sft --layers 20 --store acts.zarr --scheduler tcp://HOST:8786

On CPUs start one worker per core: below its nanny a worker computes with one thread. Rows have the bits of a run
without a cluster on the same kind of device and with the same number of threads.

A killed worker costs its shards in hand, which another one computes again. When the client or the scheduler is lost,
the workers end what they are at, nothing of it reaches the store, and the same command goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from pairtrace.engine.cost import CostMeter
from pairtrace.engine.dask_cluster import cluster_failures
from pairtrace.engine.extract_crew import Crew, muster
from pairtrace.engine.extract_messages import ClusterRun, ShardReport, ShardTask
from pairtrace.engine.extract_worker import extract_shard, leave_run
from pairtrace.engine.progress import Progress
from pairtrace.engine.shard_loop import Totals, divided_shards
from pairtrace.engine.shards import OWN_STORE, ShardWork, rendered_digest
from pairtrace.errors import ConfigError
from pairtrace.store.dask_view import store_identity
from pairtrace.store.reader import ActivationStore
from pairtrace.store.staging import leave_probe
from pairtrace.store.writer import StoreWriter
from pairtrace.version import __version__

if TYPE_CHECKING:
    from pairtrace.engine.extract import ExtractConfig
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendering import Renderer

# Shards under way for each that the cluster computes at a time: a worker has its next one at hand.
_SHARDS_PER_SLOT = 2
# Seconds after which to look whether there still are workers, and for how long there may be none.
_LOOK_SECONDS = 5.0
WORKERLESS_SECONDS = 120.0


class ClusterLoop:
    """Has the missing shards of a store computed by a cluster.

    Args:
        client: of the scheduler, whose workers have this version of pairtrace.
        config: settings of the run.
        source: the data.
        renderer: turns its pairs into token ids.
        writer: the open store, locked.
        others: stores to copy known pairs from, already found compatible.
        meter: counts what the workers spend.
        progress: hears of every shard.
    """

    def __init__(
        self,
        client: Any,
        config: ExtractConfig,
        source: PairSource,
        renderer: Renderer,
        writer: StoreWriter,
        others: Sequence[ActivationStore],
        meter: CostMeter,
        progress: Progress,
    ) -> None:
        self.client = client
        self.config = with_absolute_paths(config)
        self.source = source
        self.renderer = renderer
        self.writer = writer
        self.others = others
        self.meter = meter
        self.progress = progress
        self.totals = Totals.before(writer)
        self._address = str(config.scheduler)
        self._devices: set[str] = set()
        self._workers: set[str] = set()
        self._quarantined = 0

    def run(self, missing: Sequence[int]) -> None:
        """Have the shards `missing` computed and commit them.

        Raises:
            ConfigError: a worker does not see what this process sees, or the cluster fails.
            PairtraceError: as for an extraction here.
        """
        self.writer.unmark(missing)
        run = ClusterRun(
            id=uuid4().hex[:16],
            version=__version__,
            config=self.config,
            identity=store_identity(self.writer.manifest),
            reuse=tuple(
                (path, store_identity(other.manifest))
                for path, other in zip(self.config.reuse, self.others, strict=True)
            ),
            probe=leave_probe(self.config.store),
        )
        begun = time.perf_counter()
        try:
            with cluster_failures(self._address):
                muster(self.client, self._crew(), run, self._address)
            self.progress.start("extract", len(missing), "shards")
            self._run(run, missing)
        finally:
            self.progress.finish()
            self._dismiss(run)
        self.writer.discard_staged()
        self.totals.seconds = time.perf_counter() - begun
        self.totals.device = ", ".join(sorted(self._devices))
        self.totals.workers = len(self._workers)

    def _crew(self) -> Crew:
        if self.client.status != "running":
            raise OSError("the connection to the scheduler is lost")
        described = self.client.sync(self.client.scheduler.identity, n_workers=-1)
        return Crew.of(described["workers"], self.config.device)

    def _run(self, run: ClusterRun, missing: Sequence[int]) -> None:
        manifest = self.writer.manifest
        shards = divided_shards(self.source, self.renderer, self.config.store, manifest, self.others, missing)
        unfinished = set(missing)
        waiting: list[_Waiting] = []
        flying: dict[Any, int] = {}
        while unfinished:
            with cluster_failures(self._address):
                crew = self._crew()
            free = _SHARDS_PER_SLOT * max(1, sum(crew.slots.values())) - len(flying) - len(waiting)
            waiting += [_waiting(work, manifest.shard_rows) for work in islice(shards, max(0, free))]
            ready = [shard for shard in waiting if unfinished.isdisjoint(shard.needs)]
            waiting = [shard for shard in waiting if shard not in ready]
            with cluster_failures(self._address):
                flying |= {self._submit(run, shard.task, crew): shard.task.index for shard in ready}
                assert flying, "a shard needs earlier ones only"
                future = self._next_finished(flying)
                report = future.result()
            self._commit(report)
            unfinished.remove(flying.pop(future))

    def _submit(self, run: ClusterRun, task: ShardTask, crew: Crew) -> Any:
        key = f"pairtrace-shard-{task.index}-{run.id}"
        return self.client.submit(extract_shard, run, task, key=key, pure=False, resources=crew.resources or None)

    def _next_finished(self, flying: Collection[Any]) -> Any:
        """A future that is pending no more."""
        from distributed import TimeoutError as NothingYet
        from distributed import wait
        from distributed.client import FuturesCancelledError

        alone_since: float | None = None
        while True:
            for future in flying:
                if future.status != "pending":
                    return future
            # A cancelled future says so when it is asked.
            with suppress(NothingYet, FuturesCancelledError), self.client.as_current():
                wait(list(flying), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
                continue
            if self._crew().slots:
                alone_since = None
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since >= WORKERLESS_SECONDS:
                raise ConfigError(
                    f"the Dask cluster at {self._address} has had no worker that can take shards for "
                    f"{WORKERLESS_SECONDS:.0f} s; every finished shard is safe: start workers and run the same command "
                    "again"
                )

    def _commit(self, report: ShardReport) -> None:
        self.writer.commit(report.staged)
        totals = self.totals
        totals.rows += report.rows
        totals.computed += report.computed
        totals.reused += report.reused
        totals.tokens += report.spent.cost.model_tokens
        totals.out_of_memory += report.spent.out_of_memory
        totals.token_budget = min(totals.token_budget or report.spent.token_budget, report.spent.token_budget)
        self._quarantined += report.quarantined
        self._devices.add(report.spent.cost.device)
        self._workers.add(report.worker)
        self.meter.add_worker(report.worker, report.spent.cost)
        self.progress.advance(1, tokens=totals.tokens, quarantined=self._quarantined)

    def _dismiss(self, run: ClusterRun) -> None:
        """Have the workers let their models go; a cluster that is gone cannot be told."""
        if self.client.status == "running":
            with suppress(OSError):
                self.client.run(leave_run, run.id, wait=False, on_error="ignore")


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A shard to be submitted when the shards that it copies from are there."""

    task: ShardTask
    needs: frozenset[int]


def _waiting(work: ShardWork, shard_rows: int) -> _Waiting:
    fields = [(copy.position, copy.store, copy.row) for copy in work.copies]
    return _Waiting(
        ShardTask(
            index=work.index,
            copies=np.array(fields, np.int64).reshape(-1, 3),
            digest=rendered_digest(work.rendered),
        ),
        frozenset(copy.row // shard_rows for copy in work.copies if copy.store == OWN_STORE and copy.row < work.start),
    )


def with_absolute_paths(config: ExtractConfig) -> ExtractConfig:
    """The settings as processes with another working directory have to get them; addresses and hub ids stay."""
    template = config.chat_template
    return replace(
        config,
        data=_absolute(config.data),
        model=_absolute(config.model),
        store=_absolute(config.store),
        chat_template=None if template is None else _absolute(template),
        reuse=tuple(_absolute(path) for path in config.reuse),
    )


def _absolute(place: str) -> str:
    path = Path(place).expanduser()
    return str(path.absolute()) if path.exists() else str(place)
