"""The worker's side of an extraction on a Dask cluster: one model per process, one shard per task.

A worker reads its rows, runs its model and stages its shard in the store by itself; only numbers travel. Before it
touches anything it makes sure that it sees the same store, data, tokenizer, template and weights as the client, and
with every shard that it made the same tokens of its rows.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pairtrace.engine.cost import CostMeter, CostRecord
from pairtrace.engine.extract_messages import ClusterRun, Joined, ShardReport, ShardTask, Spent
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.shard_loop import shard_span
from pairtrace.engine.shards import Copy, ShardWork, compute_block, fill_copies, rendered_digest
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, PairtraceError, StoreError
from pairtrace.store.dask_view import open_same
from pairtrace.store.layout import QUARANTINED
from pairtrace.store.staging import ShardStager, leave_probe, sees_probe
from pairtrace.version import __version__

if TYPE_CHECKING:
    from pairtrace.engine.backend import HFBackend
    from pairtrace.store.shard_block import ShardBlock

logger = logging.getLogger(__name__)

# A model that nobody has asked for anything for so long is let go: its client may have been killed.
IDLE_SECONDS = 300.0


async def join_run(run: ClusterRun, dask_worker: Any) -> Joined:
    """Make this worker ready for a run, up to the model, which its first shard loads.

    Raises:
        ConfigError: it does not see what the client sees; the message names the worker.
    """
    # In a thread: a worker that reads all weights must still answer its scheduler.
    return await asyncio.get_running_loop().run_in_executor(None, _join, run, str(dask_worker.address))


async def leave_run(run_id: str) -> None:
    """Let go of everything that this process keeps for a run; its tasks that still run fail."""
    await asyncio.get_running_loop().run_in_executor(None, _leave, run_id)


def extract_shard(run: ClusterRun, task: ShardTask) -> ShardReport:
    """Compute one shard and stage it in the store.

    Raises:
        ConfigError: this worker does not see what the client sees; the message names the worker.
        ModelError: the model cannot be loaded, or a token is outside its embedding.
        StoreDamagedError: a row to copy is damaged.
        StoreWriteError: the shard cannot be written.
    """
    from distributed import get_worker

    worker = str(get_worker().address)
    computed = None
    while computed is None:  # another run on the same cluster may take the place of this one at any time
        workspace = _workspace_of(run, worker)
        work = workspace.divided(task)
        computed = workspace.compute(work)
    block, spent = computed
    fill_copies(block, work, workspace.reuse, workspace.own)
    return ShardReport(
        staged=workspace.stager.stage(block),
        worker=worker,
        rows=len(work.rendered),
        computed=len(work.compute),
        reused=len(work.copies),
        quarantined=int((block.status == QUARANTINED).sum()),
        spent=spent,
    )


# What this process keeps of the run that it works for, and the runs that it has left.
_workspace: _Workspace | None = None
_left: deque[str] = deque(maxlen=64)
_workspace_lock = threading.Lock()


def _join(run: ClusterRun, worker: str) -> Joined:
    workspace = _workspace_of(run, worker)
    gpu = None
    if workspace.device.type == "cuda":
        import torch

        gpu = str(torch.cuda.get_device_properties(workspace.device).uuid)
    return Joined(
        host=socket.gethostname(),
        device=str(workspace.device),
        gpu=gpu,
        versions=library_versions(),
        probe=leave_probe(run.config.store),
    )


def _leave(run_id: str) -> None:
    global _workspace  # noqa: PLW0603 - a worker is a process, and a process has one model
    with _workspace_lock:
        _left.append(run_id)
        workspace = _workspace if _workspace is not None and _workspace.run.id == run_id else None
        if workspace is not None:
            _workspace = None
    if workspace is not None:
        workspace.close()


def _workspace_of(run: ClusterRun, worker: str) -> _Workspace:
    """What this process keeps of a run; that of another run makes room first."""
    global _workspace  # noqa: PLW0603 - see above
    with _workspace_lock:
        if run.id in _left:
            raise ConfigError(f"the run {run.id} has ended")
        if _workspace is None or _workspace.run.id != run.id:
            if _workspace is not None:
                _workspace.close()
                _workspace = None
            try:
                _workspace = _Workspace(run)
            except PairtraceError as error:
                raise ConfigError(f"the Dask worker at {worker} cannot take part: {error}") from error
        return _workspace


class _Workspace:
    """What one process keeps of one run: data, renderer and stores, and from the first shard on the model.

    Its threads share it: they read, render and write at the same time, but only one at a time runs the model.

    Raises:
        PairtraceError: something is not here, or not the same as where the run was begun.
    """

    def __init__(self, run: ClusterRun) -> None:
        from pairtrace.engine.checkpoint import model_fingerprint, resolve_device
        from pairtrace.engine.fingerprints import fingerprints

        config = run.config
        self.run = run
        if run.version != __version__:
            raise ConfigError(f"it has pairtrace {__version__}, the client {run.version}; install the same version")
        self.own = open_same(config.store, run.identity)
        if not sees_probe(config.store, run.probe):
            raise StoreError(
                f"what lies at {config.store} here is a copy of the store, not the store itself; every worker has to "
                "see the same place"
            )
        self.manifest = manifest = self.own.manifest
        self.device = resolve_device(config.device)
        self.stager = ShardStager(config.store, manifest, run.probe, fsync=config.fsync)
        self.source = config.open_source()
        _require_same(f"data at {config.data}", self.source.fingerprint, manifest.data_fingerprint)
        self.renderer = config.load_renderer(config.model)
        tokenizer, template = fingerprints(self.renderer.tokenizer, self.renderer.chat_template)
        _require_same(f"tokenizer of {config.model}", tokenizer, manifest.tokenizer_fingerprint)
        _require_same("chat template", template, manifest.template_fingerprint)
        _require_same(f"model at {config.model}", model_fingerprint(config.model), manifest.model_fingerprint)
        self.reuse = [open_same(path, identity) for path, identity in run.reuse]
        # Neither open data files nor tokenizers promise to serve two threads at once.
        self._reading, self._lock = threading.Lock(), threading.Lock()
        self._model: HFBackend | None = None
        self._closed = False
        self._idle: threading.Timer | None = None
        self._open = ExitStack()
        meter = CostMeter(method="activation", stage="extract", device=self.device)
        self._meter = self._open.enter_context(meter)
        self._counted = self._meter.record

    def divided(self, task: ShardTask) -> ShardWork:
        """The shard of a task, rendered here.

        Raises:
            ConfigError: it was rendered to something else than on the client.
        """
        rows = shard_span(task.index, self.manifest)
        with self._reading:
            rendered = self.renderer.render(list(self.source.read(rows.start, rows.stop)))
        if rendered_digest(rendered) != task.digest:
            raise ConfigError(
                f"rows {rows.start} to {rows.stop - 1} become other tokens on {socket.gethostname()} than on the "
                f"client; install the same versions on both (here: {_listed(library_versions())})"
            )
        copies = [Copy(*row) for row in task.copies.tolist()]
        copied = {copy.position for copy in copies}
        compute = [
            position
            for position, result in enumerate(rendered)
            if isinstance(result, RenderedPair) and position not in copied
        ]
        return ShardWork(task.index, rows.start, rendered, compute, copies)

    def compute(self, work: ShardWork) -> tuple[ShardBlock, Spent] | None:
        """Run the model over the rows to compute, when no other thread does; the rows to copy stay empty.

        None when this was closed meanwhile.
        """
        with self._lock:
            if self._closed:
                return None
            self._stop_clock()
            model = self._model = self._model or self._loaded()
            halved = model.out_of_memory
            block = compute_block(work, model, dtype=self.manifest.dtype, sides=self.manifest.sides)
            spent = Spent(
                cost=self._cost(), out_of_memory=model.out_of_memory - halved, token_budget=model.token_budget
            )
            self._idle = threading.Timer(IDLE_SECONDS, self._let_model_go)
            self._idle.daemon = True
            self._idle.start()
        return block, spent

    def close(self) -> None:
        """Let everything go, once the shard that the model works on is done."""
        with self._lock:
            self._closed = True
            self._stop_clock()
            self._drop_model()
            self._open.close()

    def _loaded(self) -> HFBackend:
        from pairtrace.engine.backend import HFBackend

        config = self.run.config
        return HFBackend.load(
            config.model,
            self.manifest.layers,
            device=config.device,
            dtype=config.compute_dtype,
            max_length=config.max_length,
            token_budget=config.token_budget,
            fingerprint=self.manifest.model_fingerprint,
            meter=self._meter,
        )

    def _cost(self) -> CostRecord:
        before, now = self._counted, self._meter.record
        self._counted = now
        return replace(
            now,
            wall_seconds=now.wall_seconds - before.wall_seconds,
            device_seconds=now.device_seconds - before.device_seconds,
            model_tokens=now.model_tokens - before.model_tokens,
            flops=now.flops - before.flops,
        )

    def _stop_clock(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _let_model_go(self) -> None:
        with self._lock:
            if threading.current_thread() is self._idle:  # else a shard came meanwhile, or the run was left
                logger.info("the model of run %s has been idle for %.0f s: it is let go", self.run.id, IDLE_SECONDS)
                self._drop_model()

    def _drop_model(self) -> None:
        if self._model is None:
            return
        self._model = None
        # The hooks that read the layers make a circle of the model.
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def _require_same(what: str, found: str, needed: str) -> None:
    if found != needed:
        raise ConfigError(
            f"the {what} has the fingerprint {found[:12]} here, but {needed[:12]} where the run was begun; every "
            "worker has to see the same files"
        )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
