"""Work on every chunk of a Dask array of rows: one task per chunk, which opens its rows where it is.

Letters: N rows, n rows of a chunk, D width.

What the tasks return travels over the scheduler; the rows themselves never leave the process that has opened them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import pairwise
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.dask_cluster import cluster_failures
from pairtrace.engine.progress import Progress

if TYPE_CHECKING:
    import dask.array

# Sums that one task adds up.
_FAN_IN = 8


def chosen_rows(rows: dask.array.Array, chosen: np.ndarray) -> dask.array.Array:
    """Some rows of a Dask array, in order; its chunks stay chunks, of other heights.

    Args:
        rows: [N, D], one chunk along D.
        chosen: bool [N].
    """
    if chosen.all():
        return rows
    import dask.array as da

    heights = rows.chunks[0]
    counts = [int(np.count_nonzero(chosen[start:stop])) for start, stop in pairwise(_starts(rows))]
    kept: dask.array.Array = da.map_blocks(
        _chosen,
        rows,
        da.from_array(chosen[:, None], chunks=(heights, (1,))),
        dtype=rows.dtype,
        meta=np.empty((0, 0), rows.dtype),
        chunks=(tuple(counts), rows.chunks[1]),
    )
    return kept


def map_chunks(
    rows: dask.array.Array, function: Callable[..., Any], given: object, client: Any, progress: Progress
) -> Iterator[tuple[slice, Any]]:
    """`function(chunk, given=given)` of all chunks, as they finish.

    Args:
        rows: [N, D], one chunk along D.
        function: runs on a worker with a chunk [n, D].
        given: travels once to each worker.
        client: a `distributed.Client`.
        progress: is advanced by the rows done.

    Yields:
        the rows of a chunk, and the result.

    Raises:
        ConfigError: the cluster fails.
        Whatever a task raises.
    """
    graph, keys = _task_per_chunk(rows, function, given)
    starts = _starts(rows)
    for chunk, future in _as_finished(client.get(graph, keys, sync=False), client.loop):
        part = slice(int(starts[chunk]), int(starts[chunk + 1]))
        with cluster_failures(client.scheduler.address):
            result = future.result()
        yield part, result
        progress.advance(part.stop - part.start)


def sum_chunks(
    rows: dask.array.Array, function: Callable[..., Any], given: object, client: Any, progress: Progress
) -> tuple[Any, ...]:
    """Sum over all chunks of `function(chunk, given=given)`, a tuple of numbers and arrays.

    Workers add in a tree that depends on the order of the chunks only: the same bits whoever finishes first.

    Args:
        rows, function, given, client, progress: as for `map_chunks`.

    Raises:
        As `map_chunks`.
    """
    graph, keys = _task_per_chunk(rows, function, given)
    level = keys
    while len(level) > 1:
        groups = [level[start : start + _FAN_IN] for start in range(0, len(level), _FAN_IN)]
        level = [(f"sum-of-{len(level)}-{keys[0][0]}", number) for number in range(len(groups))]
        graph.update({key: (_added, group) for key, group in zip(level, groups, strict=True)})
    *parts, last = client.get(graph, [*keys, *level], sync=False)
    for chunk, future in _as_finished(parts, client.loop):
        if future.status != "finished":
            break
        progress.advance(rows.chunks[0][chunk])
    with cluster_failures(client.scheduler.address):
        total: tuple[Any, ...] = last.result()
    return total


def _starts(rows: dask.array.Array) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(rows.chunks[0], dtype=np.int64)])


def _task_per_chunk(
    rows: dask.array.Array, function: Callable[..., Any], given: object
) -> tuple[dict[Any, Any], list[Any]]:
    """A graph and the keys of its results. Dask fuses what opens a chunk with what uses it into one task."""
    import dask
    import dask.array as da

    results = da.map_blocks(
        function, rows, given=dask.delayed(given, traverse=False), dtype=np.float32, meta=np.empty((0, 0), np.float32)
    )
    (results,) = dask.optimize(results)
    return dict(results.__dask_graph__()), [keys[0] for keys in results.__dask_keys__()]


def _as_finished(futures: list[Any], loop: Any) -> Iterator[tuple[int, Any]]:
    """Numbers of futures and the futures, as they finish; a result is freed when nothing else needs it."""
    from distributed import as_completed

    numbers = {future.key: number for number, future in enumerate(futures)}
    waiting = as_completed(futures, loop=loop)
    futures.clear()
    for future in waiting:
        yield numbers[future.key], future


# On the workers


def _chosen(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return rows if chosen.all() else rows[chosen[:, 0]]


def _added(sums: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(reduce(add, parts) for parts in zip(*sums, strict=True))
