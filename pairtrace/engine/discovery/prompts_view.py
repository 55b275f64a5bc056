"""Discovery among prompts: what training changed, as groups of prompts whose answers changed alike.

rollouts of both models -> one behaviour-change vector per prompt -> cosines with every pair of a store -> clusters ->
verdicts and description. No label goes into the clusters; verdicts on the answers only say which of them to look at.
Letters: P items of the bag, D width, C clusters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pairtrace.engine.atomic import one_writer
from pairtrace.engine.behavior import require_readable
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.dask_cluster import discovery_client, require_address
from pairtrace.engine.discovery.clustering import Clustering
from pairtrace.engine.discovery.columns import Column
from pairtrace.engine.discovery.description import (
    ClusteredItems,
    Description,
    describe,
    require_describable,
    store_inputs,
)
from pairtrace.engine.discovery.exemplars import plain_text
from pairtrace.engine.discovery.flags import NOTHING_JUDGED, shown_shares, verdict_changes
from pairtrace.engine.discovery.product import Discovered, require_directory, write_product
from pairtrace.engine.discovery.prompt_bag import UNCHANGED, BagItem, bag_items
from pairtrace.engine.discovery.prompt_points import cluster_with_images, points_with_length, reduced_rows
from pairtrace.engine.discovery.prompt_reading import read_bag
from pairtrace.engine.discovery.prompts_config import PromptsConfig
from pairtrace.engine.discovery.similarity import similarity_matrix
from pairtrace.engine.discovery.stability import recluster_points
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.engine.rollouts import journal_path
from pairtrace.errors import DataError
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

__all__ = ["PromptsConfig", "discover_prompts"]

SIMILARITY_FILE = "similarity.zarr"


def discover_prompts(config: PromptsConfig, progress: Progress = NULL_PROGRESS) -> Discovered:
    """Find groups of prompts whose answers training changed alike, and write them to `config.out`.

    An interrupted run goes on: rollouts, vectors and finished columns of the cosine matrix are kept in `out`.

    Returns:
        What was written; `items` are the prompts that changed. Where too few changed there are no clusters, and
        `details["note"]` says so.

    Raises:
        ConfigError, DataError, DataMismatchError, ModelError: an option, the prompts, the rollouts or a checkpoint
            cannot be used.
        StoreError, StoreMismatchError, LayerError: the store cannot be read, or was made with another model.
        StoreLockedError: another run writes to `out`.
        MissingDependencyError: Dask, hdbscan or SciPy is not installed.
    """
    require_directory(config.out)
    if config.scheduler is not None:
        require_address(config.scheduler)
    sampled = Path(config.behavior.rollouts_out)
    resumed = sampled.exists() or journal_path(sampled).exists()
    path = costs_path(str(Path(config.out) / "clusters.json"))
    with CostMeter(method="activation", stage="discover", device=config.device, path=path, resumed=resumed) as meter:
        store = ActivationStore.open(config.store, allow_incomplete=config.allow_incomplete)
        require_readable(config.behavior, mixed=True)
        require_describable(store, config.description)
        with one_writer(config.out):
            return _discover(config, store, meter, progress)


def _discover(config: PromptsConfig, store: ActivationStore, meter: CostMeter, progress: Progress) -> Discovered:
    layer = max(store.layers) if config.layer is None else config.layer
    bag, table = read_bag(config, layer, meter, progress)
    items = bag_items(table)
    changed = bag.changed
    vectors = np.ascontiguousarray(bag.vectors[changed, 0])
    settings = config.clustering(len(changed))
    details: dict[str, Any] = {"prompts": bag.counts, "read_pairs": bag.pairs}
    if len(changed) < settings.min_cluster_size:
        needed = f"{len(changed)} of {len(items)} prompts changed, but a cluster needs {settings.min_cluster_size}"
        details["note"] = f"{needed}, so there is none; give more prompts or a lower --min-cluster-size"
        if bag.counts == {UNCHANGED: len(items)}:
            details["note"] = (
                f"none of the {len(items)} prompts changed: both models give the same answers to all of them, so "
                "there is no cluster; is --tuned the model that you mean?"
            )
        logger.warning("%s", details["note"])
        clustering, description = _nothing(len(changed), store.width)
    else:
        described = _described(config, table, [items[position] for position in changed], vectors)
        with discovery_client(config.scheduler) as client:
            matrix = Path(config.out) / SIMILARITY_FILE
            similarity = similarity_matrix(matrix, vectors, bag.fingerprint, store, layer, client, progress)
            points = points_with_length(
                reduced_rows(similarity.gram, config.dimensions),
                np.linalg.norm(vectors.astype(np.float64), axis=1),
                typical_length(store, layer),
            )
            clustering = cluster_with_images(points, settings, progress)
            description = describe(
                described,
                clustering,
                recluster_points(points, settings, cluster_with_images),
                store,
                layer,
                config.description,
                out=config.out,
                client=client,
                progress=progress,
            )
        details |= {"pairs": similarity.columns, "clustering": clustering.to_dict(), **description.details}
    shares = [share[changed] for share in shown_shares(table, items)]
    count = len(clustering.persistence)
    changes = verdict_changes(shares[0], shares[1], clustering.labels, count, config.flag_fdr)
    judged = any(change.judged for change in changes)
    if changes and not judged:
        details["flags"] = NOTHING_JUDGED
        logger.warning("%s", NOTHING_JUDGED)
    discovered = Discovered(
        view="prompts",
        layer=layer,
        clusters=tuple(
            replace(cluster, verdicts=change.to_dict() if judged else None)
            for cluster, change in zip(description.clusters, changes, strict=True)
        ),
        items=np.array([bag.items[position] for position in changed], dtype=object),
        labels=clustering.labels,
        probabilities=clustering.probabilities,
        cosines=description.cosines,
        directions=description.directions,
        inputs={**store_inputs(store), "bag_fingerprint": bag.fingerprint, "rollouts": table.manifest},
        settings=asdict(config),
        details=details,
    )
    write_product(config.out, discovered)
    return discovered


def typical_length(store: ActivationStore, layer: int) -> float:
    """Median length of the differences between the two responses of a pair.

    Raises:
        DataError: no pair of the store has a difference.
    """
    lengths = store.norms(layer)
    lengths = lengths[np.isfinite(lengths) & (lengths > 0)]
    if not lengths.size:
        raise DataError(f"no pair in {store.path} has a direction at layer {layer}, so prompts lean on none")
    return float(np.median(lengths))


def _nothing(items: int, width: int) -> tuple[Clustering, Description]:
    """No clusters, and what there is to say of them."""
    clustering = Clustering(
        labels=np.full(items, -1, np.int32),
        probabilities=np.zeros(items, np.float32),
        persistence=np.zeros(0, np.float32),
        method="none",
        details={},
    )
    cosines, directions = np.full(items, np.nan, np.float32), np.zeros((0, width), np.float32)
    return clustering, Description(clusters=(), cosines=cosines, directions=directions, details={})


def _described(
    config: PromptsConfig, table: RolloutTable, items: Sequence[BagItem], vectors: np.ndarray
) -> ClusteredItems:
    """What the description says of prompts: their texts, and the other columns of the prompt file."""

    def texts(positions: np.ndarray) -> list[dict[str, str]]:
        chosen = [items[position] for position in positions.tolist()]
        rows = [row for item in chosen for row in (item.base_rows[0], item.tuned_rows[0])]
        found = table.table.select(["messages", "response"]).take(pa.array(rows, pa.int64())).to_pylist()
        return [
            {
                "prompt": plain_text(json.loads(base["messages"])),
                "base": plain_text(base["response"]),
                "tuned": plain_text(tuned["response"]),
            }
            for base, tuned in zip(found[::2], found[1::2], strict=True)
        ]

    columns = {"condition": [item.condition for item in items]}
    if config.prompts is not None:
        known = load_prompts(config.prompts, mixed=True).by_id()
        extras = [known[item.prompt_id].extra if item.prompt_id in known else {} for item in items]
        for name in sorted({name for extra in extras for name in extra}):
            values = [extra.get(name) for extra in extras]
            if all(isinstance(value, str | int | float | None) for value in values):
                columns[name] = ["" if value is None else str(value) for value in values]
    return ClusteredItems(
        view="prompts",
        items=np.array([item.name for item in items], dtype=object),
        vectors=vectors,
        # A value that all prompts share, or that each has for itself, groups nothing.
        columns=tuple(
            Column.of(name, values) for name, values in columns.items() if 1 < len(set(values)) < len(values)
        ),
        texts=texts,
    )
