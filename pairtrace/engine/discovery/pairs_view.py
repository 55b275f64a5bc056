"""Which kinds of pair does a data set hold? The datapoint vectors of a store, reduced, clustered and described.

Letters: N rows of the store, n rows clustered, r reduced width.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pairtrace.engine.atomic import one_writer
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.dask_cluster import discovery_client, require_store
from pairtrace.engine.discovery.chunk_tasks import chosen_rows
from pairtrace.engine.discovery.clustering import ClusterConfig, Clustering, cluster
from pairtrace.engine.discovery.description import (
    ClusteredItems,
    DescriptionConfig,
    describe,
    require_describable,
    store_inputs,
)
from pairtrace.engine.discovery.product import Discovered, require_directory, write_product
from pairtrace.engine.discovery.reduced_file import REDUCED_FILE, Reduced, read_reduced, write_reduced
from pairtrace.engine.discovery.reduction import fit_reduction, reduce_rows
from pairtrace.engine.discovery.stability import recluster_points
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataError, LayerError
from pairtrace.store.dask_view import store_identity
from pairtrace.store.layout import MISSING, OK, QUARANTINED, to_float32
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

# On three preference sets of 4,000 pairs of six known kinds, densities read at the 5th neighbour gave an adjusted Rand
# index over all pairs of 0.51 to 0.54, at the 15th one of 0.41 to 0.58 and, of the clustered pairs alone, the lower one
# in two of the three.
_MIN_SAMPLES = 5
# Rows that are made float32 at a time.
_BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """What `discover_pairs` does.

    Attributes:
        store: path of the activation store.
        out: directory of the product; the reduced rows are kept there too.
        layer: residual layer; None takes the deepest one of the store.
        min_cluster_size: pairs that make a cluster; None takes `default_min_cluster_size`.
        min_samples: see `ClusterConfig`.
        selection: see `ClusterConfig`.
        method: see `ClusterConfig`.
        components: r, width that the vectors are reduced to.
        sample: cluster only so many pairs, drawn at random; None clusters all.
        seed: of everything random.
        scheduler: address of a Dask scheduler whose workers read the store; None starts processes here.
        allow_incomplete: use the finished rows of a store that still misses some.
        checksum: compare the checksum of every shard that is reduced.
        description: how clusters are described.
    """

    store: str
    out: str
    layer: int | None = None
    min_cluster_size: int | None = None
    min_samples: int = _MIN_SAMPLES
    selection: Literal["eom", "leaf"] = "eom"
    method: Literal["auto", "exact", "graph"] = "auto"
    components: int = 50
    sample: int | None = None
    seed: int = 0
    scheduler: str | None = None
    allow_incomplete: bool = False
    checksum: bool = True
    description: DescriptionConfig = field(default_factory=DescriptionConfig)

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ConfigError(f"--components is {self.components}; expected at least 1")
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"--sample is {self.sample}; expected at least 1, or all")
        self.clustering(2 if self.min_cluster_size is None else self.min_cluster_size)  # checked before any work

    def clustering(self, min_cluster_size: int) -> ClusterConfig:
        """How to cluster."""
        return ClusterConfig(
            min_cluster_size=min_cluster_size,
            min_samples=self.min_samples,
            selection=self.selection,
            method=self.method,
            seed=self.seed,
        )


def default_min_cluster_size(rows: int) -> int:
    """A thousandth of the rows, and at least 15: a kind of pair is worth a look however large the data."""
    return max(15, rows // 1000)


def discover_pairs(config: PairsConfig, progress: Progress = NULL_PROGRESS) -> Discovered:
    """Cluster the pairs of a store by the direction of their vectors, and write what was found to `config.out`.

    The reduced rows are kept in `config.out`: a second run with other settings of the clustering, or after an
    interruption, begins there. A product is complete or not there at all.

    Raises:
        ConfigError: an option is out of range, `out` cannot be written, or the Dask cluster cannot be used or fails.
        DataError: there are fewer usable pairs than `min_cluster_size`, all have the same direction, or the data is not
            that of the store.
        LayerError: the layer is not in the store.
        StoreError: the store cannot be read, or is incomplete and `allow_incomplete` is False.
        StoreLockedError: another run writes to `out`.
        MissingDependencyError: Dask, or what the clustering needs, is not installed.
    """
    out = Path(config.out)
    require_directory(out)
    with CostMeter(method="activation", stage="discover", device="cpu", path=costs_path(out)) as meter:
        if config.scheduler is not None:
            # What its workers spend is not measured here.
            meter.extra["scheduler"] = config.scheduler
        store = ActivationStore.open(config.store, allow_incomplete=config.allow_incomplete)
        layer = _layer(store, config.layer)
        require_describable(store, config.description)
        chosen = _chosen(store, config)
        count = int(chosen.sum())
        size = config.min_cluster_size or default_min_cluster_size(count)
        _require_rows(count, size, store)
        with discovery_client(config.scheduler) as client, one_writer(out):
            require_store(client, store)
            reduced, reused = _reduced(config, store, layer, chosen, client, progress)
            not_finite = _not_finite(store, layer, chosen, reduced.rows)
            _require_rows(len(reduced.rows), size, store)
            settings = config.clustering(size)
            clustering = cluster(reduced.points, settings, progress)
            described = describe(
                ClusteredItems(view="pairs", items=reduced.rows),
                clustering,
                recluster_points(reduced.points, settings),
                store,
                layer,
                config.description,
                out=out,
                client=client,
                progress=progress,
            )
        discovered = Discovered(
            view="pairs",
            layer=layer,
            clusters=described.clusters,
            items=reduced.rows,
            labels=clustering.labels,
            probabilities=clustering.probabilities,
            cosines=described.cosines,
            directions=described.directions,
            inputs=store_inputs(store),
            settings={**asdict(config), "min_cluster_size": size},
            details={
                "rows": _row_counts(store, count, len(reduced.rows), not_finite),
                "reduction": {**_reduction_details(reduced, clustering), "reused": reused},
                "clustering": {"method": clustering.method, **clustering.details},
                **described.details,
            },
        )
        write_product(out, discovered)
    return discovered


def _layer(store: ActivationStore, wanted: int | None) -> int:
    if wanted is not None and wanted not in store.layers:
        raise LayerError(f"layer {wanted} is not in {store.path}, which holds layers {list(store.layers)}")
    return max(store.layers) if wanted is None else wanted


def _chosen(store: ActivationStore, config: PairsConfig) -> np.ndarray:
    """Rows to cluster, bool [N]: those with activations, or a sample of them."""
    usable: np.ndarray = store.status() == OK
    rows = np.flatnonzero(usable)
    if config.sample is None or config.sample >= len(rows):
        return usable
    chosen = np.zeros(store.rows, bool)
    chosen[np.random.default_rng(config.seed).choice(rows, config.sample, replace=False)] = True
    return chosen


def _require_rows(count: int, size: int, store: ActivationStore) -> None:
    if count < size:
        raise DataError(
            f"{count} pairs of {store.path} can be clustered, but a cluster needs --min-cluster-size {size}; "
            "give a larger store or --sample, or a lower --min-cluster-size"
        )


def _reduced(
    config: PairsConfig, store: ActivationStore, layer: int, chosen: np.ndarray, client: Any, progress: Progress
) -> tuple[Reduced, bool]:
    """The chosen rows that have a direction, reduced; and whether an earlier run had done it."""
    path = Path(config.out) / REDUCED_FILE
    made_from = {
        "store": store_identity(store.manifest),
        "layer": layer,
        "rows": hashlib.sha256(np.packbits(chosen).tobytes()).hexdigest(),
        "components": config.components,
        "seed": config.seed,
    }
    kept = read_reduced(path, made_from)
    if kept is not None:
        logger.info("the reduced rows of an earlier run are used: %s", path)
        return kept, True
    rows = chosen_rows(store.dask(layer, checksum=config.checksum), chosen)
    reduction = fit_reduction(rows, config.components, seed=config.seed, client=client, progress=progress)
    if len(reduction.components) < config.components:
        logger.info(
            "the vectors span %d directions, so that they are reduced to those instead of %d",
            len(reduction.components), config.components,
        )  # fmt: skip
    found = reduce_rows(rows, reduction, client, progress)
    directed = np.isfinite(found.kept)
    reduced = Reduced(
        rows=np.flatnonzero(chosen)[directed],
        points=found.points[directed],
        kept=found.kept[directed],
        reduction=reduction,
    )
    write_reduced(path, reduced, made_from)
    return reduced, False


def _not_finite(store: ActivationStore, layer: int, chosen: np.ndarray, used: np.ndarray) -> int:
    """How many of the chosen rows without a direction hold NaN or infinity, which a store should not."""
    left = chosen.copy()
    left[used] = False
    rows = np.flatnonzero(left)
    broken = 0
    for first in range(0, len(rows), _BLOCK_ROWS):
        values = to_float32(store.take(layer, rows[first : first + _BLOCK_ROWS]))
        broken += int((~np.isfinite(values).all(axis=1)).sum())
    if broken:
        logger.warning(
            "%s of %s pairs hold NaN or infinity at layer %d and are left out; pairtrace store verify %s tells which",
            f"{broken:,}", f"{int(chosen.sum()):,}", layer, store.path,
        )  # fmt: skip
    return broken


def _row_counts(store: ActivationStore, chosen: int, used: int, not_finite: int) -> dict[str, int]:
    """`rows = used + undefined + not_finite + not_sampled + quarantined + missing`; undefined rows are mostly zero."""
    status = store.status()
    return {
        "rows": store.rows,
        "used": used,
        "undefined": chosen - used - not_finite,
        "not_finite": not_finite,
        "not_sampled": int((status == OK).sum()) - chosen,
        "quarantined": int((status == QUARANTINED).sum()),
        "missing": int((status == MISSING).sum()),
    }


def _reduction_details(reduced: Reduced, clustering: Clustering) -> dict[str, Any]:
    """What the reduction has kept of the rows' norms: of all, of the members of clusters, of noise."""
    members = clustering.labels >= 0
    return {
        "components": len(reduced.reduction.components),
        "share": float(reduced.reduction.share.sum()),
        "mean_cosine": reduced.reduction.mean_cosine,
        "kept": {
            name: [round(float(value), 4) for value in np.quantile(kept, (0.05, 0.5, 0.95))] if kept.size else None
            for name, kept in (
                ("all", reduced.kept),
                ("members", reduced.kept[members]),
                ("noise", reduced.kept[~members]),
            )
        },
    }
