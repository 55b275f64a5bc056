"""Scoring on an existing Dask cluster: one task per shard, and only scores travel back.

Legend: n rows of a shard, B behaviours.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.dask_cluster import check_workers, cluster_failures, connect, given, one_thread, open_store_rows
from pairtrace.engine.score_blocks import Scorer
from pairtrace.store.dask_view import store_identity
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

# Enough that a worker has its next shards at hand while the scores of the last one travel.
_TASKS_PER_THREAD = 4


def cluster_scores(
    address: str, store: ActivationStore, layer: int, scorer: Scorer, *, checksum: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and scores float32 [n, B] of the finished shards of a store, in order: the same bits as computed here.

    A task uses one thread for its numerics: give the workers as many threads or processes as they have cores. What a
    lost worker had in hand is computed again by another one.

    Args:
        address: of the scheduler, for example tcp://host:8786.
        store: which every worker must see under the same path or address.
        layer: a layer of the store.
        scorer: of the behaviours.
        checksum: compare the checksum of every shard that is read.

    Raises:
        ConfigError: nothing answers at the address, there are no workers, they have another version of pairtrace, or
            the cluster fails.
        StoreError: a worker cannot open the store.
        StoreDamagedError: a chunk is damaged; the message names shard and rows.
        MissingDependencyError: Dask is not installed.
    """
    client = connect(address)
    with closing(client):
        threads = check_workers(client, address)
        identity = store_identity(store.manifest)
        path = store.path if "://" in store.path else str(Path(store.path).absolute())
        held = client.submit(given, scorer, pure=False)
        pending: deque[tuple[int, Any]] = deque()
        for shard in store.finished_shards():
            future = client.submit(
                _score_shard, path, identity, f"diff/{layer}", shard, held, checksum=checksum, pure=False
            )
            pending.append((shard * store.manifest.shard_rows, future))
            if len(pending) >= _TASKS_PER_THREAD * threads:
                yield _next_of(pending, address)
        while pending:
            yield _next_of(pending, address)


def _next_of(pending: deque[tuple[int, Any]], address: str) -> tuple[int, np.ndarray]:
    start, future = pending.popleft()
    with cluster_failures(address):
        scores: np.ndarray = future.result()
    return start, scores.copy()  # what arrives is read-only


# On the workers


def _score_shard(path: str, identity: str, array: str, shard: int, scorer: Scorer, *, checksum: bool) -> np.ndarray:
    """Scores float32 [n, B] of one shard."""
    reader = open_store_rows(path, identity)
    with one_thread():
        scaled = reader.manifest.dtype == "int8"
        norms = reader.chunk(array.replace("diff/", "norm/"), shard, checksum=checksum) if scaled else None
        return scorer.scores(reader.vectors(array, shard, checksum=checksum), norms)
