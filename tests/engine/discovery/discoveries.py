"""Small discoveries, made up."""

from __future__ import annotations

from typing import Any

import numpy as np

from pairtrace.engine.discovery.enrichment import Enrichment
from pairtrace.engine.discovery.exemplars import Datapoint, Exemplar
from pairtrace.engine.discovery.product import DescribedCluster, Discovered, View, direction_name
from pairtrace.engine.discovery.stability import Stability
from tests.engine.small_store import MODEL, TEMPLATE, TOKENIZER

ENRICHED = Enrichment(
    among="members",
    column="source",
    value="web",
    inside=3,
    inside_total=4,
    outside=0,
    outside_total=6,
    share_inside=0.75,
    share_inside_interval=(0.3, 0.95),
    share_outside=0.0,
    ratio=None,
    p_value=1 / 3,
    q_value=0.01,
)
STABLE = Stability(jaccard=0.8, lowest=0.5, runs=20, recovered=15, dissolved=1, grade="stable")


def make_cluster(view: View, number: int, size: int, **changes: Any) -> DescribedCluster:
    fields: dict[str, Any] = {
        "number": number,
        "size": size,
        "persistence": 0.25,
        "direction": direction_name(number),
        "cosine_median": 0.7,
        "cosine_low": 0.4,
        "exemplars": (
            Exemplar(
                item=3 if view == "pairs" else "p3",
                probability=1.0,
                cosine=0.9,
                texts={"prompt": "how?", "chosen": "so", "rejected": "not so"},
            ),
        ),
        "top_datapoints": (Datapoint(row=8, cosine=0.95, source="web", texts={}),),
        "enrichment": (ENRICHED,),
        "stability": STABLE,
        "name": "praises the user",
    }
    return DescribedCluster(**{**fields, **changes})


def make_discovery(view: View = "pairs", *, width: int = 24, seed: int = 0, **changes: Any) -> Discovered:
    """Ten items in two clusters, and noise."""
    labels = np.array([0, 1, 0, -1, 0, 1, 0, -1, -1, 1], np.int32)
    rng = np.random.default_rng(seed)
    rows = np.arange(10, dtype=np.int64) * 3
    fields: dict[str, Any] = {
        "view": view,
        "layer": 5,
        "clusters": (make_cluster(view, 0, 4), make_cluster(view, 1, 3, stability=None, name=None)),
        "items": rows if view == "pairs" else np.array([f"p{row}" for row in rows], object),
        "labels": labels,
        "probabilities": np.where(labels >= 0, rng.random(10), 0).astype(np.float32),
        "cosines": np.where(labels >= 0, rng.random(10), np.nan).astype(np.float32),
        "directions": rng.normal(size=(2, width)).astype(np.float32),
        "inputs": {
            "store": "/stores/acts.zarr",
            "model_fingerprint": MODEL,
            "tokenizer_fingerprint": TOKENIZER,
            "template_fingerprint": TEMPLATE,
        },
        "settings": {"min_cluster_size": 3},
        "details": {"enrichment_tests": 12},
    }
    return Discovered(**{**fields, **changes})
