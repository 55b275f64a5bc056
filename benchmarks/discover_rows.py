"""Planted mixtures of directions, and one method that clusters them, each run in a process of its own.

python benchmarks/discover_rows.py METHOD FOLDER MIN_CLUSTER_SIZE    # prints JSON; bench_discover.py calls it

FOLDER holds rows.f16 (float16 [N, D], N and D in size.json) and, for the competitors, points.npy, the reduced rows that
pairtrace leaves there. Labels go to FOLDER/METHOD.npy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 256
REDUCED = 50
CLUSTERS = 40
NOISE = 0.2
# Cosine of a cluster's members with its direction, drawn for each cluster; of two members it is the square.
COSINES = (0.35, 0.6)
# The largest cluster is so many times the smallest.
UNEVEN = 4.0
MIN_SAMPLES = 10
CHUNK = 1 << 16
# Rows that are clustered before the clock starts.
WARM_UP = 2_000
REFERENCE = "hdbscan-exact"


def write_rows(folder: Path, rows: int, seed: int) -> np.ndarray:
    """Make the rows, chunk by chunk; returns the planted labels, -1 for noise."""
    rng = np.random.default_rng(seed)
    directions = unit(rng.standard_normal((CLUSTERS, WIDTH), dtype=np.float32))
    cosines = rng.uniform(*COSINES, CLUSTERS).astype(np.float32)
    shares = rng.uniform(1, UNEVEN, CLUSTERS)
    labels = rng.choice(CLUSTERS, rows, p=shares / shares.sum())
    labels[rng.random(rows) < NOISE] = -1
    with (folder / "rows.f16").open("wb") as stream:
        for start in range(0, rows, CHUNK):
            mine = labels[start : start + CHUNK]
            block = unit(rng.standard_normal((len(mine), WIDTH), dtype=np.float32))
            member = mine >= 0
            towards = cosines[mine[member], None]
            block[member] = towards * directions[mine[member]] + np.sqrt(1 - towards**2) * block[member]
            stream.write(block.astype(np.float16).tobytes())
    (folder / "size.json").write_text(json.dumps([rows, WIDTH]))
    return labels


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def read_chunk(path: str, start: int, rows: int, width: int) -> np.ndarray:
    block = np.fromfile(path, np.float16, rows * width, offset=start * width * 2)
    return block.reshape(rows, width)


def lazy_rows(folder: Path) -> Any:
    """The rows as a Dask array whose tasks read their chunk from the file."""
    import dask.array as da
    from dask.delayed import delayed

    rows, width = json.loads((folder / "size.json").read_text())
    read = delayed(read_chunk, pure=True)
    chunks = []
    for start in range(0, rows, CHUNK):
        height = min(CHUNK, rows - start)
        block = read(str(folder / "rows.f16"), start, height, width)
        chunks.append(da.from_delayed(block, (height, width), np.float16))
    return da.concatenate(chunks)


def by_pairtrace(folder: Path, min_cluster_size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The whole way: reduction on a local Dask cluster, the neighbour graph, the clusters."""
    from pairtrace.engine.dask_cluster import discovery_client
    from pairtrace.engine.discovery.clustering import ClusterConfig, cluster
    from pairtrace.engine.discovery.reduction import fit_reduction, reduce_rows

    times = [time.perf_counter()]
    with discovery_client(None) as client:
        rows = lazy_rows(folder)
        few = rows[:WARM_UP]
        warm = reduce_rows(few, fit_reduction(few, REDUCED, seed=0, client=client), client).points
        cluster(warm, ClusterConfig(min_cluster_size=10, min_samples=MIN_SAMPLES, method="graph"))
        times.append(time.perf_counter())
        points = reduce_rows(rows, fit_reduction(rows, REDUCED, seed=0, client=client), client).points
        times.append(time.perf_counter())
        # Inside: the command keeps its workers for the description.
        config = ClusterConfig(min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES, method="graph")
        found = cluster(points, config)
        times.append(time.perf_counter())
    np.save(folder / "points.npy", points)
    start, reduction, clustering = np.diff(times).tolist()
    stages = {"seconds_start": start, "seconds_reduction": reduction, "seconds_clustering": clustering}
    return found.labels, {"seconds": reduction + clustering, **stages, **found.details}


def by_exact_hdbscan(min_cluster_size: int) -> Any:
    from hdbscan import HDBSCAN

    # The quickest of its exact algorithms at this width; the default takes a short cut in its spanning tree.
    return HDBSCAN(min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES, algorithm="prims_kdtree")


def by_hdbscan(min_cluster_size: int) -> Any:
    from hdbscan import HDBSCAN

    return HDBSCAN(min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES, core_dist_n_jobs=-1)


def by_fast_hdbscan(min_cluster_size: int) -> Any:
    from fast_hdbscan import HDBSCAN

    return HDBSCAN(min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES)


def by_scikit_learn(min_cluster_size: int) -> Any:
    from sklearn.cluster import HDBSCAN

    # It counts the point itself.
    return HDBSCAN(min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES + 1, n_jobs=-1)


def by_evoc(min_cluster_size: int) -> Any:
    from evoc import EVoC

    return EVoC(base_min_cluster_size=min_cluster_size, min_samples=MIN_SAMPLES, random_state=0)


# What each is called, and the package it needs.
COMPETITORS: dict[str, tuple[Callable[[int], Any], str]] = {
    REFERENCE: (by_exact_hdbscan, "hdbscan"),
    "hdbscan": (by_hdbscan, "hdbscan"),
    "fast-hdbscan": (by_fast_hdbscan, "fast_hdbscan"),
    "scikit-learn": (by_scikit_learn, "sklearn"),
    "evoc": (by_evoc, "evoc"),
}


def main() -> None:
    method, folder, min_cluster_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if method == "pairtrace":
        labels, told = by_pairtrace(folder, min_cluster_size)
    else:
        points = np.load(folder / "points.npy")
        estimator = COMPETITORS[method][0](min_cluster_size)
        COMPETITORS[method][0](10).fit_predict(points[:WARM_UP])  # imports and compilation count as start-up
        begun = time.perf_counter()
        labels = estimator.fit_predict(points)
        told = {"seconds": time.perf_counter() - begun}
    np.save(folder / f"{method}.npy", labels.astype(np.int32))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
