"""Whether a cluster is found again when chance draws the items anew.

Every run draws items with replacement, clusters those that were drawn with another seed, and looks for the cluster that
is most similar to each original one: the bootstrap of C. Hennig, "Cluster-wise assessment of cluster stability",
Computational Statistics & Data Analysis 52 (2007). Items that were drawn more than once count once (his option
`multipleboot=FALSE`), since points at distance zero would be the densest of all. Letters: n items, m items of a run,
r width, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from pairtrace.engine.discovery.clustering import EXACT_UP_TO, ClusterConfig, Clustering, cluster
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError

Recluster = Callable[[np.ndarray, int], np.ndarray]
"""Clusters some items: (positions int64 [m], ascending; seed) -> labels int32 [m], -1 for noise."""

RECOVERED, DISSOLVED = 0.75, 0.5
# Hennig's reading of a mean Jaccard coefficient (documentation of clusterboot in his R package fpc).
GRADES = ((0.85, "highly stable"), (0.75, "stable"), (0.6, "doubtful"), (0.0, "unstable"))
# Members in a run's sample below which its Jaccard coefficient says more about the sample than about the cluster.
FEWEST_MEMBERS = 5


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much of a cluster is found again when chance draws the items anew (Hennig 2007).

    Attributes:
        jaccard: mean over the runs of the Jaccard coefficient with the most similar cluster.
        lowest: of the runs.
        runs: in which the cluster had enough members to be judged.
        recovered: runs with more than 0.75.
        dissolved: runs with 0.5 or less.
        grade: "highly stable" (jaccard from 0.85), "stable" (from 0.75), "doubtful" (from 0.6: a pattern, but which
            items belong to it is uncertain) or "unstable".
    """

    jaccard: float
    lowest: float
    runs: int
    recovered: int
    dissolved: int
    grade: str


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """How stability is measured.

    Attributes:
        runs: how often; 0 leaves it out.
        items: most items that a run draws. From more items than that only so many are drawn, which keeps the cost of
            a large discovery down and leaves its smallest clusters unjudged.
        seed: of the draws; run i clusters with seed + 1 + i.
    """

    runs: int = 20
    items: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.runs < 0:
            raise ConfigError(f"the number of stability runs is {self.runs}; expected 0 or more")
        if self.items < 2:
            raise ConfigError(f"the number of items of a stability run is {self.items}; expected at least 2")


def recluster_points(
    points: np.ndarray, config: ClusterConfig, by: Callable[[np.ndarray, ClusterConfig], Clustering] = cluster
) -> Recluster:
    """Clusters some of the points as all were clustered.

    The sizes that the configuration speaks of shrink with the share of the points, since the clusters do, but not below
    `FEWEST_MEMBERS`. What was too much for the exact method is clustered on a graph each time.

    Args:
        points: float32 [n, r], as `cluster` takes them.
        config: with which all points were clustered.
        by: what clustered them.
    """

    def shrunk(size: int, share: float) -> int:
        return max(min(size, FEWEST_MEMBERS), round(size * share))

    def recluster(positions: np.ndarray, seed: int) -> np.ndarray:
        share = len(positions) / len(points)
        own = replace(
            config,
            min_cluster_size=shrunk(config.min_cluster_size, share),
            min_samples=None if config.min_samples is None else shrunk(config.min_samples, share),
            method="graph" if config.method == "auto" and len(points) > EXACT_UP_TO else config.method,
            neighbors=None,
            seed=seed,
        )
        chosen = points[positions]
        if np.count_nonzero(np.isfinite(chosen).all(axis=1)) < own.min_cluster_size:
            return np.full(len(positions), -1, np.int32)
        return by(chosen, own).labels

    return recluster


def measure_stability(
    labels: np.ndarray,
    clusters: int,
    recluster: Recluster,
    config: StabilityConfig,
    progress: Progress = NULL_PROGRESS,
) -> list[Stability | None]:
    """How stable each cluster is.

    Args:
        labels: int32 [n], number of the cluster, -1 for noise.
        clusters: C.
        recluster: see `Recluster`, and `recluster_points`.
        config: how often, and with how many items.
        progress: counts runs.

    Returns:
        Per cluster; None where no run had at least `FEWEST_MEMBERS` of its members.
    """
    found: list[list[float]] = [[] for _ in range(clusters)]
    if clusters:
        progress.start("stability", config.runs, "runs")
        for run in range(config.runs):
            draw = np.random.default_rng([config.seed, run]).integers(len(labels), size=min(len(labels), config.items))
            positions = np.unique(draw)
            again = recluster(positions, config.seed + 1 + run)
            sizes, best = best_jaccard(labels[positions], again, clusters)
            for number in np.flatnonzero(sizes >= FEWEST_MEMBERS).tolist():
                found[number].append(float(best[number]))
            progress.advance(1)
        progress.finish()
    return [_stability(values) if values else None for values in found]


def best_jaccard(labels: np.ndarray, again: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard coefficient of every cluster with the most similar one of another clustering.

    Noise is no cluster on either side.

    Args:
        labels: int [m], -1 for noise.
        again: int [m], of the other clustering.
        clusters: C, number of clusters of `labels`.

    Returns:
        int64 [C] members among the m items, and float64 [C] coefficients; 0 where nothing matches.
    """
    others = int(again.max(initial=-1)) + 1
    cells = (labels.astype(np.int64) + 1) * (others + 1) + (again.astype(np.int64) + 1)
    table = np.bincount(cells, minlength=(clusters + 1) * (others + 1)).reshape(clusters + 1, others + 1)
    sizes = table.sum(axis=1)[1:]
    if not others:
        return sizes, np.zeros(clusters)
    common = table[1:, 1:]
    union = sizes[:, None] + table.sum(axis=0)[None, 1:] - common
    return sizes, (common / np.maximum(union, 1)).max(axis=1)


def _stability(values: list[float]) -> Stability:
    jaccard = float(np.mean(values))
    return Stability(
        jaccard=jaccard,
        lowest=min(values),
        runs=len(values),
        recovered=sum(value > RECOVERED for value in values),
        dissolved=sum(value <= DISSOLVED for value in values),
        grade=next(grade for least, grade in GRADES if jaccard >= least),
    )
