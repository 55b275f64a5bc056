"""How alike two probes or directions are: as vectors, and as rankings of the pairs of a store.

Legend: N pairs, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pairtrace.engine.diagnosis.agreement import agreement
from pairtrace.engine.directions import Direction, load_directions
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.score_blocks import Scorer, local_scores
from pairtrace.errors import ConfigError, ProbeMismatchError
from pairtrace.store.layout import OK
from pairtrace.store.reader import ActivationStore


@dataclass(frozen=True, kw_only=True)
class ProbeCompareConfig:
    """What `compare_probes` does.

    Attributes:
        first, second: probe or direction files; the same one twice compares its directions with each other.
        store: activation store whose rows are ranked by both; None compares the vectors alone.
        layers: only these; None for all that both files have (and the store, if any).
        top_share: share of the pairs that counts as the top of a ranking.
        allow_incomplete: use the finished rows of a store that still misses some.
    """

    first: str
    second: str
    store: str | None = None
    layers: tuple[int, ...] | None = None
    top_share: float = 0.01
    allow_incomplete: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_share < 1:
            raise ConfigError(f"--top-share is {self.top_share}; expected a share between 0 and 1, such as 0.01")


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Two directions at one layer.

    Attributes:
        first, second: their names.
        layer: the residual layer.
        cosine: of the vectors.
        same_model: whether both were made from the same checkpoint; None when unknown.
        spearman: rank correlation of the scores; None without a store.
        top: size of the top; None without a store.
        top_overlap: share of the top that both have; None without a store.
    """

    first: str
    second: str
    layer: int
    cosine: float
    same_model: bool | None
    spearman: float | None = None
    top: int | None = None
    top_overlap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_probes(config: ProbeCompareConfig, progress: Progress = NULL_PROGRESS) -> list[Likeness]:
    """Compare every vector of one file with every one of another, layer by layer.

    Raises:
        DirectionError: a file cannot be read, or has another width than the store or vectors of other tokens.
        ProbeMismatchError: the files have no layer in common, or different widths, or are one with a single vector.
        StoreError: the store cannot be used.
    """
    store = None if config.store is None else ActivationStore.open(
        config.store, allow_incomplete=config.allow_incomplete
    )  # fmt: skip
    width = None if store is None else store.width
    files = [
        [one for one in load_directions(path, width=width, note=False) if one.kind == "vector"]
        for path in (config.first, config.second)
    ]
    if store is not None:
        for one in (*files[0], *files[1]):
            one.require_responses()
    layers = _common_layers(config, files, store)
    found = []
    progress.start("compare", len(layers), "layers")
    for layer in layers:
        first, second = ([one for one in file if one.layer == layer] for file in files)
        scores = None if store is None else _scores(store, layer, [*first, *second])
        for row, one in enumerate(first):
            for column, other in enumerate(second, len(first)):
                if config.first == config.second and column - len(first) <= row:
                    continue
                ranked = None if scores is None else (scores[:, row], scores[:, column])
                found.append(_likeness(one, other, layer, ranked, config.top_share))
        progress.advance(1)
    progress.finish()
    if not found:
        raise ProbeMismatchError(f"{config.first} was given twice", "two vectors of a layer or more", "one of each")
    return found


def _likeness(
    one: Direction, other: Direction, layer: int, ranked: tuple[np.ndarray, np.ndarray] | None, top_share: float
) -> Likeness:
    if one.values.shape[1] != other.values.shape[1]:
        raise ProbeMismatchError(
            f"{one.origin} and {other.origin} have different widths", one.values.shape[1], other.values.shape[1]
        )
    a, b = (direction.values[0].astype(np.float64) for direction in (one, other))
    prints = (one.model_fingerprint, other.model_fingerprint)
    figures: dict[str, Any] = {}
    if ranked is not None:
        top = max(1, round(top_share * int(np.isfinite(ranked[0]).sum())))
        correlation, overlap = agreement(*ranked, top)
        figures = {"spearman": correlation, "top": top, "top_overlap": overlap}
    return Likeness(
        first=one.name,
        second=other.name,
        layer=layer,
        cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
        same_model=None if None in prints else prints[0] == prints[1],
        **figures,
    )


def _scores(store: ActivationStore, layer: int, directions: Sequence[Direction]) -> np.ndarray:
    """float32 [N, directions]: cosines with the rows of a layer, as `pairtrace score` has them; NaN where none."""
    # Names need not be unique here, and the directions may come from another model.
    scorer = Scorer.of(directions, store.manifest.dtype)
    scores = np.full((store.rows, len(directions)), np.nan, np.float32)
    for start, block in local_scores(store, layer, scorer, checksum=True):
        scores[start : start + len(block)] = block
    scores[store.status() != OK] = np.nan
    return scores


def _common_layers(
    config: ProbeCompareConfig, files: Sequence[Sequence[Direction]], store: ActivationStore | None
) -> list[int]:
    held = [{one.layer for one in file if one.layer is not None} for file in files]
    common = held[0] & held[1]
    if store is not None:
        common &= set(store.layers)
    absent = sorted(set(config.layers or ()) - common)
    if absent or not common:
        listed = [f"{path}: {sorted(layers)}" for path, layers in zip((config.first, config.second), held, strict=True)]
        if store is not None:
            listed.append(f"{store.path}: {list(store.layers)}")
        raise ProbeMismatchError(
            "there is nothing to compare at this layer" if absent else "no layer is common to all",
            ", ".join(map(str, absent)) or "a common layer",
            "; ".join(listed),
        )
    return sorted(common if config.layers is None else set(config.layers))
