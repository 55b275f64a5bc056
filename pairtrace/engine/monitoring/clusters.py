"""Clusters that a monitor watches: those that a discovery found, and new ones.

Letters: n answers, P items, K samples, C clusters, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pairtrace.engine.directions import Direction, load_directions, read_manifest, save_directions
from pairtrace.engine.discovery.product import read_product
from pairtrace.errors import DataFormatError, DataMismatchError

Kind = Literal["known", "new", "candidate"]
# A cluster wider than this would take in answers that changed in any way at all.
LEAST_COSINE = 0.2
_PRINTS = ("model_fingerprint", "tokenizer_fingerprint", "template_fingerprint")


@dataclass(frozen=True, kw_only=True, eq=False)
class WatchedCluster:
    """A direction, and how close to it a changed answer must be.

    Attributes:
        name: of the cluster.
        kind: "known" from a discovery; "new" since it held for two steps; "candidate" until then.
        direction: float32 [D], of unit length.
        threshold: least cosine of a member: the 5th percentile of the cosines of those that made the cluster.
        flagged: a discovery flagged it: verdicts on its prompts changed beyond chance.
    """

    name: str
    kind: Kind
    direction: np.ndarray
    threshold: float
    flagged: bool = False

    @classmethod
    def around(cls, members: np.ndarray, *, name: str) -> WatchedCluster | None:
        """A candidate out of its members, float32 [n, D] of unit length; None where they cancel out."""
        mean = members.mean(axis=0, dtype=np.float64)
        norm = float(np.linalg.norm(mean))
        if norm < 1e-6:
            return None
        direction = (mean / norm).astype(np.float32)
        low = float(np.percentile(members @ direction, 5))
        return cls(name=name, kind="candidate", direction=direction, threshold=max(low, LEAST_COSINE))


def known_clusters(directory: str, prints: dict[str, str], layer: int | None) -> tuple[int, list[WatchedCluster]]:
    """The clusters of a discovery.

    Args:
        directory: that `pairtrace discover prompts` wrote.
        prints: fingerprints of the base model, by name.
        layer: that was asked for; None for that of the discovery.

    Returns:
        The layer, and the clusters that have a direction.

    Raises:
        DataError: the directory does not hold a discovery.
        DataMismatchError: it was made of pairs, with another model, tokenizer or template, or at another layer.
    """
    found = read_product(directory)
    if found.view != "prompts":
        raise DataMismatchError(
            f"{directory} holds a discovery among {found.view}; expected one among prompts: clusters of pairs say what "
            "the data is like, and would take answers in that nothing is wrong with"
        )
    for name in _PRINTS:
        actual = found.inputs.get(name)
        if actual is not None and actual != prints[name]:
            raise DataMismatchError(
                f"the clusters of {directory} were found with the {name} {actual}, but this run has {prints[name]}; "
                "discover them with the checkpoint that training started from"
            )
    if layer is not None and layer != found.layer:
        raise DataMismatchError(
            f"the clusters of {directory} were found at layer {found.layer}, but --layer is {layer}; leave --layer out"
        )
    clusters = []
    for one in found.clusters:
        norm = float(np.linalg.norm(found.directions[one.number]))
        if one.direction is not None and norm > 0:
            clusters.append(
                WatchedCluster(
                    name=one.direction,
                    kind="known",
                    direction=(found.directions[one.number] / norm).astype(np.float32),
                    threshold=max(one.cosine_low or 0.0, LEAST_COSINE),
                    flagged=one.flagged,
                )
            )
    return found.layer, clusters


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32 [..., D]; zero for a row that is zero (unchanged) or not finite (not read)."""
    finite = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0.0).astype(np.float32)
    norms = np.linalg.norm(finite, axis=-1, keepdims=True)
    units: np.ndarray = np.divide(finite, norms, out=np.zeros_like(finite), where=norms > 0)
    return units


def assign(units: np.ndarray, clusters: Sequence[WatchedCluster]) -> np.ndarray:
    """The cluster of each answer: the closest one among those whose threshold it reaches.

    Args:
        units: float32 [..., D], of unit length or zero.
        clusters: C clusters.

    Returns:
        int64 [...], position in `clusters`, -1 for none.
    """
    if not clusters:
        return np.full(units.shape[:-1], -1, np.int64)
    cosines = units @ np.stack([cluster.direction for cluster in clusters], axis=1)
    cosines[cosines < np.array([cluster.threshold for cluster in clusters], np.float32)] = -np.inf
    return np.where(np.isfinite(cosines).any(axis=-1), cosines.argmax(axis=-1), -1)


def save_watched(path: Path, clusters: Sequence[WatchedCluster], *, layer: int, prints: dict[str, str]) -> None:
    """Write new clusters and candidates as a direction file; nothing where there are none."""
    if clusters:
        common: dict[str, Any] = {name: prints[name] for name in _PRINTS}
        directions = [
            Direction(
                name=one.name,
                layer=layer,
                values=one.direction[None],
                kind="vector",
                origin=str(path),
                **common,
            )
            for one in clusters
        ]
        figures = {one.name: {"kind": one.kind, "threshold": one.threshold} for one in clusters}
        save_directions(path, directions, {"watched": figures})


def load_watched(path: Path, names: Sequence[str]) -> list[WatchedCluster]:
    """Read what `save_watched` wrote, in the order of `names`.

    Raises:
        DirectionError: the file cannot be read.
        DataFormatError: it does not hold these clusters.
    """
    if not names:
        return []
    figures = read_manifest(path).get("watched")
    found = {one.name: one.values[0] for one in load_directions(path)}
    if not isinstance(figures, dict) or set(figures) != set(names) or set(found) != set(names):
        raise DataFormatError(f"{path} does not hold the clusters {', '.join(names)} that the log names; start again")
    return [WatchedCluster(name=name, direction=found[name], **figures[name]) for name in names]
