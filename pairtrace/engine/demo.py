"""The demonstration: the whole job on the tiny model organism, whose planted pairs are known.

The labels are read only at the end, to say how well the ranking did; nothing before looks at them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.behavior import BehaviorConfig, build_behavior
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.organism.build import build_organism
from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.ranking import RankedPair, SourceShare, sources, top
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import ConfigError

BEHAVIOR = "compliance"
PLANTED = "planted"
OVER_REFUSAL = "over_refusal"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `run_demo` does.

    Attributes:
        out: directory for everything; finished stages in it are kept.
        organism: the recipe of the organism, its seed included.
        samples: rollouts per prompt and condition.
        max_base_rate: of the four-condition filter.
        show: pairs to show from the top of the ranking.
    """

    out: str
    organism: OrganismConfig
    samples: int = 8
    max_base_rate: float = 0.0
    show: int = 5


@dataclass(frozen=True, kw_only=True)
class DemoSummary:
    """How well the ranking finds the planted pairs.

    Attributes:
        roc_auc: probability that a planted pair outranks another pair, ties counting half.
        precision_at_k: share of planted pairs among the first k, where k is the number of planted pairs.
        roc_auc_over_refusal: as `roc_auc`, against the over-refusal pairs alone (nearly the same direction).
        layer: the layer scored: the last before the final norm, chosen without labels.
        seed: of the organism.
        pairs: rows of the preference data.
        planted: k.
        kept: prompts that passed the four-condition filter.
        rates: rate of the behaviour by model and condition, over the discovery rollouts.
        seconds: wall time per stage, as measured when the stage was computed.
        top: the first pairs of the ranking.
        sources: share of each source among the first k.
        out: directory of the files.
    """

    roc_auc: float
    precision_at_k: float
    roc_auc_over_refusal: float
    layer: int
    seed: int
    pairs: int
    planted: int
    kept: int
    rates: dict[str, float]
    seconds: dict[str, float]
    top: tuple[RankedPair, ...]
    sources: tuple[SourceShare, ...]
    out: str

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def run_demo(config: DemoConfig, progress: Progress = NULL_PROGRESS) -> DemoSummary:
    """Train the organism, extract, build the behaviour, score, and compare the ranking with the planted labels.

    Raises:
        ConfigError: `out` holds something else.
    """
    out = Path(config.out)
    organism = build_organism(config.organism, out / "organism", progress=progress)
    layer = config.organism.layers
    store, direction, scores = out / "acts.zarr", out / f"{BEHAVIOR}.safetensors", out / "scores.parquet"
    settings = {
        "samples": config.samples,
        "max_base_rate": config.max_base_rate,
        "layer": layer,
        "organism": config.organism.identity(),
    }
    stages = _Stages(out / "demo.json", settings)
    stages.run(
        "extract",
        store,
        lambda: extract(
            ExtractConfig(data=str(organism.preferences), model=str(organism.m0), layers=(layer,), store=str(store)),
            progress,
        ).to_dict(),
    )
    behavior = stages.run(
        "behavior",
        direction,
        lambda: build_behavior(
            BehaviorConfig(
                prompts=str(organism.discovery),
                base=str(organism.m0),
                tuned=str(organism.m1),
                out=str(direction),
                store=str(store),
                kinds="mean",
                samples=config.samples,
                max_base_rate=config.max_base_rate,
                max_new_tokens=48,
                batch_size=128,
            ),
            progress,
        ).to_dict(),
    )
    stages.run(
        "score",
        scores,
        lambda: score(ScoreConfig(store=str(store), directions=(str(direction),), out=str(scores)), progress).to_dict(),
    )
    kinds = [json.loads(line)["kind"] for line in organism.preferences.read_text(encoding="utf-8").splitlines()]
    column = pq.read_table(scores, columns=[f"score:{BEHAVIOR}"]).column(0).to_numpy(zero_copy_only=False)
    figures = ranking_figures(column, np.asarray(kinds))
    planted = kinds.count(PLANTED)
    return DemoSummary(
        roc_auc=figures["roc_auc"],
        precision_at_k=figures["precision_at_k"],
        roc_auc_over_refusal=figures["roc_auc_over_refusal"],
        layer=layer,
        seed=config.organism.seed,
        pairs=len(kinds),
        planted=planted,
        kept=behavior["kept"],
        rates={f"{cell['model']} {cell['condition']}": cell["rate"] for cell in behavior["cells"]},
        seconds={**organism.seconds, **stages.seconds},
        top=tuple(top(scores, k=config.show, ends="top")),
        sources=tuple(sources(scores, k=planted)),
        out=str(out),
    )


class _Stages:
    """Runs each stage once and keeps its figures, so that a second demo only reads them."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._state: dict[str, Any] = {"settings": settings, "stages": {}}
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["settings"] != settings:
                raise ConfigError(
                    f"{path.parent} holds another demo, perhaps of another version of pairtrace: "
                    f"{'; '.join(_differences(state['settings'], settings))}; give another --out, or remove it"
                )
            self._state = state

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stage["seconds"] for name, stage in self._state["stages"].items()}

    def run(self, name: str, product: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        stages: dict[str, Any] = self._state["stages"]
        if name not in stages or not product.exists():
            began = time.perf_counter()
            figures = work()
            stages[name] = {"seconds": round(time.perf_counter() - began, 3), "figures": figures}
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(self._state, indent=1), encoding="utf-8")
        kept: dict[str, Any] = stages[name]["figures"]
        return kept


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Settings that differ, in words; those of the organism one by one."""
    flat = [
        {name: value for name, value in {**settings, **settings.get("organism", {})}.items() if name != "organism"}
        for settings in (found, wanted)
    ]
    there, now = ({name: repr(value) for name, value in settings.items()} for settings in flat)
    return [
        f"{name} is {there.get(name, 'absent')} there and {now.get(name, 'absent')} now"
        for name in {**there, **now}
        if there.get(name) != now.get(name)
    ]


def ranking_figures(scores: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Compare a ranking with labels; rows without a score (NaN) come last.

    Args:
        scores: float [N].
        kinds: str [N], `PLANTED`, `OVER_REFUSAL` or anything else.
    """
    filled = np.where(np.isnan(scores), -np.inf, scores)
    planted = kinds == PLANTED
    confounders = kinds == OVER_REFUSAL
    k = int(planted.sum())
    first = np.argsort(-filled, kind="stable")[:k]
    return {
        "roc_auc": roc_auc(filled[planted], filled[~planted]),
        "precision_at_k": float(planted[first].mean()),
        "roc_auc_over_refusal": roc_auc(filled[planted], filled[confounders]),
    }


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney U over the product)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / (2 * len(negative)))
