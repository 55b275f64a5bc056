"""Groups of points that point the same way, and the noise between them (HDBSCAN, exact or on a neighbour graph).

Letters: N points, r width, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError

# Up to this many points "auto" takes the exact method.
EXACT_UP_TO = 5_000


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How to cluster.

    Attributes:
        min_cluster_size: points that make a cluster, at least 2; fewer are noise.
        min_samples: the density at a point is read at its `min_samples`-th nearest point, the point itself included;
            None takes `min_cluster_size`.
        selection: "eom" takes the most persistent clusters of the hierarchy, "leaf" the finest.
        method: "exact" is the hdbscan package, "graph" an approximate neighbour graph in its place; "auto" is exact up
            to `EXACT_UP_TO` points.
        neighbors: neighbours per point in the graph, the point itself included, at least `min_samples`; None chooses.
        seed: of everything random; the same seed gives the same bits.
    """

    min_cluster_size: int
    min_samples: int | None = None
    selection: Literal["eom", "leaf"] = "eom"
    method: Literal["auto", "exact", "graph"] = "auto"
    neighbors: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.min_cluster_size < 2:
            raise ConfigError(f"min_cluster_size must be at least 2, not {self.min_cluster_size}")


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """What `cluster` found.

    Attributes:
        labels: int32 [N], -1 for noise; clusters are numbered from 0 by size, the largest first, ties by first member.
        probabilities: float32 [N], how firmly a point belongs to its cluster; 0 for noise.
        persistence: float32 [C], the share of the possible persistence that a cluster has.
        method: "exact" or "graph".
        details: settings as used and how good the approximation is.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    persistence: np.ndarray
    method: str
    details: dict[str, Any]


def cluster(points: np.ndarray, config: ClusterConfig, progress: Progress = NULL_PROGRESS) -> Clustering:
    """Cluster unit rows by Euclidean distance, which orders them as the cosine does.

    Args:
        points: float32 [N, r], unit rows; a row with NaN has no direction and is noise.
        config: how.
        progress: receives the stages.
    """
    raise NotImplementedError
