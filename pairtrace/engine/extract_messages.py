"""What the client and the workers of an extraction on a cluster tell each other: numbers, paths and figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pairtrace.engine.cost import CostRecord
from pairtrace.store.staging import StagedShard

if TYPE_CHECKING:
    from pairtrace.engine.extract import ExtractConfig


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """One extraction, as its workers know it.

    Attributes:
        id: of the run, unique.
        version: of pairtrace, on the client.
        config: settings, with absolute paths.
        identity: `store_identity` of the store.
        reuse: path and `store_identity` of each store to copy known pairs from.
        probe: object that the client has left in the store.
    """

    id: str
    version: str
    config: ExtractConfig
    identity: str
    reuse: tuple[tuple[str, str], ...]
    probe: str


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a worker says when it takes part in a run.

    Attributes:
        host: its name.
        device: where its model will run.
        gpu: identity of that GPU; None on a CPU.
        versions: of the libraries that decide the values.
        probe: object that it has left in the store.
    """

    host: str
    device: str
    gpu: str | None
    versions: dict[str, str]
    probe: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to compute.

    Attributes:
        index: number of the shard.
        copies: int64 [n, 3], the fields of each `Copy`.
        digest: `rendered_digest` of the shard, as the client rendered it.
    """

    index: int
    copies: np.ndarray
    digest: str


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a shard took.

    Attributes:
        cost: what the worker has spent since the last shard that it computed.
        out_of_memory: how often the token budget was halved.
        token_budget: afterwards.
    """

    cost: CostRecord
    out_of_memory: int
    token_budget: int


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What became of a shard.

    Attributes:
        staged: what to commit.
        worker: address of the worker.
        rows, computed, reused, quarantined: numbers of rows of the shard.
        spent: what it took.
    """

    staged: StagedShard
    worker: str
    rows: int
    computed: int
    reused: int
    quarantined: int
    spent: Spent
