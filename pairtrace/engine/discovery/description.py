"""What is known of each cluster: members and datapoints that stand for it, direction, enrichment, stability, name.

Letters: n items, N rows of the store, D width, C clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.baselines.store_pairs import open_store_data
from pairtrace.engine.discovery.clustering import Clustering
from pairtrace.engine.discovery.columns import Column, require_columns, store_columns
from pairtrace.engine.discovery.enrichment import Counts, count_datapoints, count_members, enrichments
from pairtrace.engine.discovery.exemplars import Datapoint, Exemplar, pair_texts, typical_members
from pairtrace.engine.discovery.naming import NAMES_FILE, Names, NamingConfig, propose_names
from pairtrace.engine.discovery.product import DescribedCluster, View, direction_name
from pairtrace.engine.discovery.stability import Recluster, Stability, StabilityConfig, measure_stability
from pairtrace.engine.discovery.store_passes import CANCELLED, ClosestRows, closest_rows, mean_directions
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataError, MissingDependencyError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

# Rows of the store closest to a cluster of prompts that are tested for their sources: 1 % of all, within these limits.
_FEWEST_TESTED, _MOST_TESTED = 20, 1_000


@dataclass(frozen=True, kw_only=True)
class DescriptionConfig:
    """How clusters are described.

    Attributes:
        exemplars: members shown per cluster.
        top_datapoints: rows of the store shown per cluster.
        metadata: columns of the data that clusters may be enriched in, besides the source; None takes all that hold
            plain values, () none.
        data: where the preference data is; None for the path that the store recorded.
        false_discovery_rate: largest q-value of an enrichment that is kept.
        stability: how stability is measured.
        naming: the judge that proposes names; None for no names.
    """

    exemplars: int = 5
    top_datapoints: int = 10
    metadata: tuple[str, ...] | None = None
    data: str | None = None
    false_discovery_rate: float = 0.05
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    naming: NamingConfig | None = None

    def __post_init__(self) -> None:
        for name in ("exemplars", "top_datapoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.false_discovery_rate < 1:
            raise ConfigError(f"--fdr is {self.false_discovery_rate}; expected above 0 and below 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusteredItems:
    """What was clustered.

    Attributes:
        view: "pairs" (the items are rows of the store) or "prompts".
        items: int64 [n] rows, or object [n] ids of prompts.
        vectors: float32 [n, D], behaviour-change vectors of prompts; None for pairs, whose vectors are in the store.
        columns: of prompts: what they may be enriched in.
        texts: of prompts: texts of the items at some positions int64 [m], such as "prompt", "base" and "tuned".
    """

    view: View
    items: np.ndarray
    vectors: np.ndarray | None = None
    columns: tuple[Column, ...] = ()
    texts: Callable[[np.ndarray], list[dict[str, str]]] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Description:
    """What `describe` found; the fields of `Discovered` that it knows.

    Attributes:
        clusters: C clusters.
        cosines: float32 [n], with the mean direction of the item's own cluster; NaN for noise.
        directions: float32 [C, D]; zero for a cluster without one.
        details: plain JSON values: whether the texts were there, tests made, columns left out and why, stability runs.
    """

    clusters: tuple[DescribedCluster, ...]
    cosines: np.ndarray
    directions: np.ndarray
    details: dict[str, Any]


def describe(
    items: ClusteredItems,
    clustering: Clustering,
    recluster: Recluster | None,
    store: ActivationStore,
    layer: int,
    config: DescriptionConfig,
    *,
    out: str | Path,
    client: Any = None,
    progress: Progress = NULL_PROGRESS,
) -> Description:
    """Describe every cluster.

    The direction of a cluster of pairs is the mean of its unit rows, that of a cluster of prompts the mean of its
    behaviour-change vectors. Clusters of pairs are tested for sources and metadata of their members; clusters of
    prompts for the columns of the prompts, and for sources and metadata of their top datapoints (1 % of the rows,
    at least 20 and at most 1,000).

    Args:
        items: n items.
        clustering: of the items.
        recluster: clusters some of the items, for the stability (see `recluster_points`); None leaves it out.
        store: with the datapoints.
        layer: of the store.
        config: how.
        out: directory of the product, where answers of the judge are kept.
        client: a `distributed.Client` whose workers read the store; None reads it here.
        progress: receives the stages.

    Raises:
        ConfigError: a column of the metadata is not there, or the cluster of Dask failed.
        DataError: `config.data` cannot be read or is not the data of the store. Where the store recorded a path that is
            no longer there, texts and metadata are left out with a warning.
        StoreError: the store cannot be read.
    """
    labels, count = clustering.labels, len(clustering.persistence)
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.searchsorted(labels[order], np.arange(count)))[1:]
    source = _open_data(store, config.data)
    by_row = np.full(store.rows, -1, np.int32)
    if items.vectors is None:
        by_row[items.items] = labels
        directions = mean_directions(store, layer, by_row, count, client=client, progress=progress)
    else:
        directions = _mean_vectors(items.vectors, members)
    tested_rows = min(max(store.rows // 100, _FEWEST_TESTED), _MOST_TESTED) if items.view == "prompts" else 0
    k = max(config.top_datapoints, tested_rows)
    closest = closest_rows(store, layer, directions, k, by_row, client=client, progress=progress)
    cosines = closest.own[items.items] if items.vectors is None else _own_cosines(items.vectors, directions, labels)
    columns, left_out = store_columns(store, source, config.metadata) if count else ([], {})
    enriched, tests = enrichments(
        [*_counts(items, labels, count, columns), *_datapoint_counts(store, closest.rows[:, :tested_rows], columns)],
        count,
        false_discovery_rate=config.false_discovery_rate,
    )
    exemplars, datapoints = _shown(items, clustering, cosines, closest, store, source, config)
    stability: list[Stability | None] = [None] * count
    if recluster is not None:
        stability = measure_stability(labels, count, recluster, config.stability, progress)
    names = _names(items.view, exemplars, config.naming, Path(out), progress)
    clusters = tuple(
        _cluster(
            number,
            float(clustering.persistence[number]),
            cosines[members[number]],
            bool(directions[number].any()),
            exemplars=exemplars[number],
            top_datapoints=datapoints[number],
            enrichment=enriched[number],
            stability=stability[number],
            name=names.names[number] if names is not None else None,
        )
        for number in range(count)
    )
    details: dict[str, Any] = {
        "texts": source is not None,
        "enrichment_tests": tests,
        "columns_left_out": left_out,
        "datapoints_tested": tested_rows,
        "stability_runs": config.stability.runs if recluster is not None else 0,
        "stability_items": min(len(labels), config.stability.items),
        "naming": None if names is None else {k: v for k, v in vars(names).items() if k != "names"},
    }
    return Description(clusters=clusters, cosines=cosines, directions=directions, details=details)


def require_describable(store: ActivationStore, config: DescriptionConfig) -> None:
    """Find out before the clustering that the data and its columns are there, where they were asked for.

    Raises:
        ConfigError: a column of the metadata is not there.
        DataError: `config.data` cannot be read or is not the data of the store.
    """
    if config.data is not None or config.metadata:
        require_columns(_open_data(store, config.data), config.metadata or ())


def store_inputs(store: ActivationStore) -> dict[str, Any]:
    """What a product says of the store that it was made from; `Discovered.inputs` has these and what else there is."""
    manifest = store.manifest
    return {
        "store": store.path if "://" in store.path else str(Path(store.path).absolute()),
        "store_rows": manifest.rows,
        "model": manifest.model,
        "model_fingerprint": manifest.model_fingerprint,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "template_fingerprint": manifest.template_fingerprint,
        "data": manifest.data,
        "data_fingerprint": manifest.data_fingerprint,
    }


def _open_data(store: ActivationStore, data: str | None) -> PairSource | None:
    """The data of the store; None, with a warning, where nobody said where it is and it cannot be read."""
    try:
        return open_store_data(store, data)
    except (DataError, MissingDependencyError) as error:
        if data is not None:
            raise
        logger.warning("the clusters are described without texts and metadata: %s", error)
        return None


def _mean_vectors(vectors: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the members' vectors, float32 [C, D]; zero where they cancel but for rounding."""
    means = np.zeros((len(members), vectors.shape[1]), np.float32)
    for number, positions in enumerate(members):
        own = vectors[positions].astype(np.float64)
        mean = own.mean(axis=0)
        if np.linalg.norm(mean) > CANCELLED * np.linalg.norm(own, axis=1).mean():
            means[number] = mean
    return means


def _own_cosines(vectors: np.ndarray, directions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float32 [n]: cosine of a vector with the direction of its own cluster, NaN without one."""
    cosines = np.full(len(vectors), np.nan, np.float32)
    members = np.flatnonzero(labels >= 0)
    own, given = directions[labels[members]].astype(np.float64), vectors[members].astype(np.float64)
    lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(given, axis=1)
    directed = lengths > 0
    products = np.einsum("nd,nd->n", own[directed], given[directed])
    cosines[members[directed]] = products / lengths[directed]
    return cosines


def _counts(items: ClusteredItems, labels: np.ndarray, clusters: int, store_columns: Sequence[Column]) -> list[Counts]:
    columns = items.columns if items.view == "prompts" else [one.take(items.items) for one in store_columns]
    return [count_members(column, labels, clusters) for column in columns]


def _datapoint_counts(store: ActivationStore, rows: np.ndarray, columns: Sequence[Column]) -> list[Counts]:
    if not rows.size:
        return []
    usable = store.status() == OK
    return [count_datapoints(column, rows, usable) for column in columns]


def _shown(
    items: ClusteredItems,
    clustering: Clustering,
    cosines: np.ndarray,
    closest: ClosestRows,
    store: ActivationStore,
    source: PairSource | None,
    config: DescriptionConfig,
) -> tuple[list[tuple[Exemplar, ...]], list[tuple[Datapoint, ...]]]:
    """Exemplars and top datapoints of every cluster, with their texts."""
    typical = typical_members(
        clustering.labels, clustering.probabilities, cosines, len(clustering.persistence), config.exemplars
    )
    top = closest.rows[:, : config.top_datapoints]
    shown_rows = np.unique(top[top >= 0])
    sources = dict(zip(shown_rows.tolist(), store.row_reader().take("source", shown_rows).tolist(), strict=True))
    wanted = set(sources)
    if items.view == "pairs":
        wanted |= {row for positions in typical for row in items.items[positions].tolist()}
    texts = {} if source is None else pair_texts(source, wanted)

    def member_texts(positions: np.ndarray) -> list[dict[str, str]]:
        if items.view == "pairs":
            return [texts.get(row, {}) for row in items.items[positions].tolist()]
        return [{}] * len(positions) if items.texts is None else items.texts(positions)

    exemplars = [
        tuple(
            Exemplar(
                item=items.items[position].item() if items.view == "pairs" else str(items.items[position]),
                probability=float(clustering.probabilities[position]),
                cosine=_number(cosines[position]),
                texts=shown,
            )
            for position, shown in zip(positions.tolist(), member_texts(positions), strict=True)
        )
        for positions in typical
    ]
    datapoints = [
        tuple(
            Datapoint(
                row=row,
                cosine=cosine,
                source=sources[row],
                texts=texts.get(row, {}),
            )
            for row, cosine in zip(rows.tolist(), values.tolist(), strict=False)
            if row >= 0
        )
        for rows, values in zip(top, closest.cosines, strict=True)
    ]
    return exemplars, datapoints


def _names(
    view: View, exemplars: Sequence[Sequence[Exemplar]], config: NamingConfig | None, out: Path, progress: Progress
) -> Names | None:
    if config is None or not exemplars:
        return None
    return propose_names(
        view, [[one.texts for one in group] for group in exemplars], config, out / NAMES_FILE, progress
    )


def _cluster(
    number: int, persistence: float, cosines: np.ndarray, directed: bool, **described: Any
) -> DescribedCluster:
    known = cosines[np.isfinite(cosines)]
    return DescribedCluster(
        number=number,
        size=len(cosines),
        persistence=persistence,
        direction=direction_name(number) if directed else None,
        cosine_median=float(np.median(known)) if known.size else None,
        cosine_low=float(np.quantile(known, 0.05)) if known.size else None,
        **described,
    )


def _number(value: np.float32) -> float | None:
    return float(value) if np.isfinite(value) else None
