"""Passes over all rows of a store for all clusters at once: mean directions, and the rows closest to them.

They run here, or as Dask tasks of a few shards each; the bits are the same. Letters: N rows, n rows of a shard, D
width, C clusters, k rows kept per cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.dask_cluster import cluster_failures, given, one_thread, open_store_rows
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.score_blocks import Scorer
from pairtrace.kernels.topk import StreamingTopK
from pairtrace.store.dask_view import store_identity
from pairtrace.store.layout import OK, to_float32
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader

# Sums are added up in groups of so many shards, whoever does it: so that they come out the same, and travel seldom.
_SHARDS_PER_TASK = 4
_TASKS_PER_THREAD = 2
# A mean that is shorter, against the mean length, is what rounding has left over of vectors that cancel.
CANCELLED = 1e-6
# Rows that are made float32 at a time.
_BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosestRows:
    """The rows of a store with the highest cosines with each cluster's direction.

    Attributes:
        cosines: float32 [C, k], best first; NaN where a cluster has fewer rows, or no direction.
        rows: int64 [C, k]; -1 there.
        own: float32 [N], cosine of a row with the direction of its own cluster; NaN without one.
    """

    cosines: np.ndarray
    rows: np.ndarray
    own: np.ndarray


def mean_directions(
    store: ActivationStore,
    layer: int,
    labels: np.ndarray,
    clusters: int,
    *,
    client: Any = None,
    progress: Progress = NULL_PROGRESS,
) -> np.ndarray:
    """Mean of the members' unit rows, per cluster.

    Args:
        store: complete, or its finished rows count.
        layer: of the store.
        labels: int32 [N], number of the cluster; -1 for rows that belong to none.
        clusters: C.
        client: a `distributed.Client` whose workers do it; None does it here.
        progress: counts pairs.

    Returns:
        float32 [C, D]; zero for a cluster whose rows cancel.

    Raises:
        StoreError, StoreDamagedError: the store cannot be read.
        ConfigError: the cluster of Dask failed.
    """
    sums = np.zeros((clusters, store.width))
    if not clusters:
        return sums.astype(np.float32)
    progress.start("mean directions", store.rows, "pairs")
    for rows, (present, part) in _tasks(store, client, _sum_units, f"diff/{layer}", (labels,)):
        sums[present] += part
        progress.advance(rows)
    progress.finish()
    counts = np.bincount(labels[labels >= 0], minlength=clusters)
    means = sums / np.maximum(counts, 1)[:, None]
    means[np.linalg.norm(means, axis=1) <= CANCELLED] = 0
    return means.astype(np.float32)


def closest_rows(
    store: ActivationStore,
    layer: int,
    directions: np.ndarray,
    k: int,
    labels: np.ndarray,
    *,
    client: Any = None,
    progress: Progress = NULL_PROGRESS,
) -> ClosestRows:
    """The k rows with the highest cosine per cluster, and every row's cosine with its own cluster.

    Args:
        store: complete, or its finished rows count.
        layer: of the store.
        directions: float32 [C, D]; a zero row is the direction of nothing.
        k: rows kept per cluster.
        labels: int32 [N], as for `mean_directions`.
        client: as for `mean_directions`.
        progress: counts pairs.

    Raises:
        as for `mean_directions`.
    """
    own = np.full(store.rows, np.nan, np.float32)
    pointing = np.flatnonzero(directions.any(axis=1))
    cosines = np.full((len(directions), k), np.nan, np.float32)
    rows = np.full((len(directions), k), -1, np.int64)
    if not pointing.size:
        return ClosestRows(cosines=cosines, rows=rows, own=own)
    column = np.full(len(directions) + 1, -1, np.int32)  # the last one answers for -1
    column[pointing] = np.arange(len(pointing))
    scorer = Scorer(
        vectors=directions[pointing],
        vector_columns=tuple(range(len(pointing))),
        banks=(),
        bank_columns=(),
        row_dtype="bfloat16" if store.manifest.dtype == "bfloat16" else None,
    )
    usable = store.status() == OK
    best = StreamingTopK(k, len(pointing))
    progress.start("top datapoints", store.rows, "pairs")
    work = _tasks(store, client, _closest, f"diff/{layer}", (column[labels], usable), (scorer, k))
    for count, (part, places, values) in work:
        best.merge(part)
        own[places] = values
        progress.advance(count)
    progress.finish()
    kept_cosines, kept_rows = best.result()
    width = kept_rows.shape[1]
    cosines[pointing, :width], rows[pointing, :width] = kept_cosines, kept_rows
    return ClosestRows(cosines=cosines, rows=rows, own=own)


def _tasks(
    store: ActivationStore,
    client: Any,
    work: Callable[..., Any],
    array: str,
    by_row: Sequence[np.ndarray],
    shared: Sequence[Any] = (),
) -> Iterator[tuple[int, Any]]:
    """Number of rows and result of every group of finished shards, in order.

    `work(reader, array, shards, starts, *parts of by_row, *shared)` gets, per shard, the part of every array [N].
    """
    manifest, shards = store.manifest, store.finished_shards()
    spans = [(shard * manifest.shard_rows, min((shard + 1) * manifest.shard_rows, store.rows)) for shard in shards]
    groups = [slice(first, first + _SHARDS_PER_TASK) for first in range(0, len(shards), _SHARDS_PER_TASK)]

    def arguments(group: slice) -> list[Any]:
        parts = [[values[start:stop] for start, stop in spans[group]] for values in by_row]
        return [array, shards[group], [start for start, _ in spans[group]], *parts]

    counts = [sum(stop - start for start, stop in spans[group]) for group in groups]
    if client is None:
        reader = store.row_reader()
        for count, group in zip(counts, groups, strict=True):
            yield count, work(reader, *arguments(group), *shared)
        return
    path = store.path if "://" in store.path else str(Path(store.path).absolute())
    address, identity = client.scheduler.address, store_identity(manifest)
    most = _TASKS_PER_THREAD * max(1, sum(client.nthreads().values()))
    held = [client.submit(given, one, pure=False) for one in shared]
    pending: deque[tuple[int, Any]] = deque()
    for count, group in zip(counts, groups, strict=True):
        future = client.submit(_on_worker, path, identity, work, *arguments(group), *held, pure=False)
        pending.append((count, future))
        if len(pending) >= most:
            yield _result(pending, address)
    while pending:
        yield _result(pending, address)


def _result(pending: deque[tuple[int, Any]], address: str) -> tuple[int, Any]:
    count, future = pending.popleft()
    with cluster_failures(address):
        return count, future.result()


# In tasks


def _on_worker(path: str, identity: str, work: Callable[..., Any], *arguments: Any) -> Any:
    reader = open_store_rows(path, identity)
    with one_thread():
        return work(reader, *arguments)


def _sum_units(
    reader: RowReader, array: str, shards: Sequence[int], _: Sequence[int], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that occur, int64 [c], and the sums of their unit rows, float64 [c, D]."""
    present = np.unique(np.concatenate(labels))
    present = present[present >= 0].astype(np.int64)
    sums = np.zeros((len(present), reader.manifest.width))
    for shard, numbers in zip(shards, labels, strict=True):
        if (numbers < 0).all():
            continue
        stored = reader.vectors(array, shard)
        for first in range(0, len(stored), _BLOCK_ROWS):
            own = numbers[first : first + _BLOCK_ROWS]
            members = np.flatnonzero(own >= 0)
            if not members.size:
                continue
            order = members[np.argsort(own[members], kind="stable")]
            rows = to_float32(stored[first : first + _BLOCK_ROWS])[order]
            lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
            directed = np.isfinite(lengths) & (lengths > 0)
            rows[~directed] = 0
            rows /= np.where(directed, lengths, 1).astype(np.float32)[:, None]
            found, starts = np.unique(own[order], return_index=True)
            sums[np.searchsorted(present, found)] += np.add.reduceat(rows, starts, axis=0)
    return present, sums


def _closest(
    reader: RowReader,
    array: str,
    shards: Sequence[int],
    starts: Sequence[int],
    columns: Sequence[np.ndarray],
    usable: Sequence[np.ndarray],
    scorer: Scorer,
    k: int,
) -> tuple[StreamingTopK, np.ndarray, np.ndarray]:
    """The best rows of some shards; and numbers and cosines of the rows that belong to a cluster."""
    assert scorer.vectors is not None
    best = StreamingTopK(k, len(scorer.vectors))
    places, values = [], []
    for shard, start, column, good in zip(shards, starts, columns, usable, strict=True):
        scaled = reader.manifest.dtype == "int8"
        norms = reader.chunk(array.replace("diff/", "norm/"), shard) if scaled else None
        scores = scorer.scores(reader.vectors(array, shard), norms)
        scores[~good] = np.nan
        best.update(scores, start)
        members = np.flatnonzero(column >= 0)
        places.append(members + start)
        values.append(scores[members, column[members]])
    return best, np.concatenate(places), np.concatenate(values)
