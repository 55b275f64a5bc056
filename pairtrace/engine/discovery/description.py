"""What is known of each cluster: members and datapoints that stand for it, direction, enrichment, stability, name.

Letters: n items, N rows of the store, D width, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.discovery.clustering import Clustering
from pairtrace.engine.discovery.columns import Column
from pairtrace.engine.discovery.naming import NamingConfig
from pairtrace.engine.discovery.product import DescribedCluster, View
from pairtrace.engine.discovery.stability import Recluster, StabilityConfig
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError
from pairtrace.store.reader import ActivationStore


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
        details: plain JSON values: tests made, columns left out, whose texts are missing and why, stability runs.
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
    raise NotImplementedError
