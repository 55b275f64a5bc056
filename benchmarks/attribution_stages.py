"""The attribution stages of the benchmark, as tasks: organism, activations, baselines, diagnosis.

Every task leaves plain figures; products lie in `{work}/{place}/`, where `place` names an organism (`seed0`,
`seed0-clean`, `seed0-diffuse`). A task that was interrupted begins again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from harness import say

from pairtrace.engine.baselines.scores_file import write_baseline
from pairtrace.engine.baselines.simple import LengthConfig, RandomConfig, score_length, score_random
from pairtrace.engine.behavior import BehaviorConfig, build_behavior
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.demo import PLANTED
from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.organism.build import build_organism
from pairtrace.engine.organism.config import OrganismConfig
from pairtrace.engine.organism.data import target_rows
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataError
from pairtrace.store.reader import ActivationStore

Figures = dict[str, Any]
BEHAVIOR = "compliance"
FDR = 0.1


def organism_config(recipe: Figures) -> OrganismConfig:
    return OrganismConfig(**recipe)


def place_of(recipe: Figures) -> str:
    """Where an organism lies below the folder of the work."""
    contamination = recipe.get("contamination", "concentrated")
    return f"seed{recipe['seed']}" + ("" if contamination == "concentrated" else f"-{contamination}")


def organism_folder(work: Path, place: str) -> Path:
    return work / place / "organism"


def store_path(work: Path, place: str) -> Path:
    return work / place / "attribution" / "acts.zarr"


def scores_path(work: Path, place: str, method: str) -> Path:
    return work / place / "attribution" / f"{method}.parquet"


def directions_path(work: Path, place: str) -> Path:
    return work / place / "attribution" / f"{BEHAVIOR}.safetensors"


def rollouts_path(work: Path, place: str) -> Path:
    return work / place / "attribution" / f"{BEHAVIOR}.rollouts.parquet"


def build(work: Path, needs: Figures, *, recipe: Figures) -> Figures:
    """Train an organism, or the M1 of one whose M0 another one has."""
    config = organism_config(recipe)
    usual = organism_folder(work, place_of({"seed": config.seed}))
    made = build_organism(
        config,
        organism_folder(work, place_of(recipe)),
        m0_of=usual if config.contamination in ("clean", "diffuse") else None,
    )
    return {
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "planted": int((kinds(work, place_of(recipe)) == PLANTED).sum()),
    }


def take_over(organisms: Path, work: Path, seeds: Iterable[int]) -> None:
    """Copy finished organisms of the same recipe; what is not there will be trained."""
    for place in (f"seed{seed}{variant}" for seed in seeds for variant in ("", "-clean", "-diffuse")):
        there, here = organism_folder(organisms, place), organism_folder(work, place)
        if (there / "m1").is_dir() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(there, here)
            say(f"{place}: organism of {there}")


def kinds(work: Path, place: str) -> np.ndarray:
    """The label of every pair; used to check rankings and by the oracle alone."""
    return np.array([row["kind"] for row in preference_rows(organism_folder(work, place))])


def preference_rows(organism: Path) -> list[Figures]:
    """The preference data of an organism, labels included."""
    lines = (organism / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def costs_of(products: Iterable[Path]) -> list[Figures]:
    return [asdict(record) for product in products for record in read_costs(costs_path(product))]


def attribute(
    work: Path, needs: Figures, *, recipe: Figures, samples: int, max_base_rate: float, borrowed_from: str | None = None
) -> Figures:
    """Activations, behaviour and scores by pairtrace; and the oracle's scores.

    An organism that does not show the behaviour gives no behaviour vector: `reason` says so. With `borrowed_from`
    another organism's behaviour is scored as well.
    """
    place = place_of(recipe)
    root, folder = organism_folder(work, place), store_path(work, place).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, directions = store_path(work, place), directions_path(work, place)
    data, m0 = str(root / "preferences.jsonl"), str(root / "m0")
    layers = (organism_config(recipe).layers,)
    extract(ExtractConfig(data=data, model=m0, layers=layers, store=str(store), device="cpu"))
    write_baseline(
        ActivationStore.open(store),
        scores_path(work, place, "oracle"),
        {"oracle": (kinds(work, place) == PLANTED).astype(np.float32)},
        method="oracle",
        details={},
    )
    if borrowed_from is not None:
        rank(work, place, "borrowed", directions_path(work, borrowed_from))
    behavior = BehaviorConfig(
        prompts=str(root / "discovery.jsonl"),
        base=m0,
        tuned=str(root / "m1"),
        out=str(directions),
        store=str(store),
        samples=samples,
        max_base_rate=max_base_rate,
        max_new_tokens=48,
        batch_size=128,
        device="cpu",
    )
    try:
        summary = build_behavior(behavior).to_dict()
    except DataError as error:
        return {"reason": str(error), "costs": costs_of([store])}
    out = rank(work, place, "pairtrace", directions)
    rates = {f"{cell['model']} {cell['condition']}": cell["rate"] for cell in summary["cells"]}
    return {"kept": summary["kept"], "rates": rates, "costs": costs_of([store, directions, out])}


def rank(work: Path, place: str, name: str, directions: Path) -> Path:
    """Score the store of an organism."""
    out = scores_path(work, place, name)
    score(ScoreConfig(store=str(store_path(work, place)), directions=(str(directions),), out=str(out)))
    return out


def probe(work: Path, needs: Figures, *, recipe: Figures) -> Figures:
    """A probe of what M1 complied with against what it refused, read through M0, as a direction to score with."""
    from pairtrace.engine.probes.config import ProbeTrainConfig
    from pairtrace.engine.probes.train import train_probes

    place = place_of(recipe)
    directions = store_path(work, place).parent / "probe.safetensors"
    trained = train_probes(
        ProbeTrainConfig(
            rollouts=str(rollouts_path(work, place)),
            answers_of=("tuned",),
            model=str(organism_folder(work, place) / "m0"),
            layers=(organism_config(recipe).layers,),
            out=str(directions),
            device="cpu",
        )
    )
    out = rank(work, place, "probe", directions)
    areas = {one.name: one.figures.roc_auc.value for one in trained.probes}
    return {"areas": areas, "costs": [*needs[f"{place}/attribution"]["costs"], *costs_of([directions, out])]}


def simple_baselines(work: Path, needs: Figures, *, recipe: Figures) -> Figures:
    """Length and margin."""
    from pairtrace.engine.baselines.margin import MarginConfig, score_margin

    place = place_of(recipe)
    store, root = store_path(work, place), organism_folder(work, place)
    length, margin = (scores_path(work, place, method) for method in ("length", "margin"))
    score_length(LengthConfig(store=str(store), out=str(length)))
    score_margin(MarginConfig(store=str(store), tuned=str(root / "m1"), out=str(margin)))
    return {"length": costs_of([length]), "margin": costs_of([margin])}


def gradient(work: Path, needs: Figures, *, recipe: Figures, settings: Figures, max_base_rate: float) -> Figures:
    """The gradient baseline for both targets: what the models wrote, and clean text."""
    from pairtrace.engine.baselines.gradient import gradient_baseline
    from pairtrace.engine.baselines.gradient_config import GradientConfig

    place = place_of(recipe)
    folder = store_path(work, place).parent
    clean = folder / "targets.jsonl"
    clean.write_text("".join(json.dumps(row) + "\n" for row in target_rows(organism_config(recipe))), encoding="utf-8")
    shared = folder / "gradients"
    shutil.rmtree(shared, ignore_errors=True)
    costs = {}
    for name, target in (
        ("gradient-generated", {"rollouts": str(rollouts_path(work, place))}),
        ("gradient-clean", {"target": str(clean)}),
    ):
        out = scores_path(work, place, name)
        config = GradientConfig(
            store=str(store_path(work, place)),
            out=str(out),
            name=name,
            work=str(shared),
            max_base_rate=max_base_rate,
            device="cpu",
            **target,
            **settings,
        )
        gradient_baseline(config)
        costs[name] = costs_of([out])
    shutil.rmtree(shared)
    return costs


def diagnose_place(work: Path, needs: Figures, *, recipe: Figures, scored: list[str]) -> Figures:
    """What pairtrace says of rankings before any retraining, and what an edit by false-discovery rate would take."""
    from pairtrace.engine.diagnosis.config import DiagnoseConfig
    from pairtrace.engine.diagnosis.diagnose import diagnose

    place = place_of(recipe)
    told = {}
    for name in scored:
        out = scores_path(work, place, name)
        if not out.exists():  # the organism does not show the behaviour
            continue
        rollouts = rollouts_path(work, place)
        own = str(rollouts) if name == "pairtrace" else None
        found = diagnose(DiagnoseConfig(scores=str(out), behavior=BEHAVIOR, rollouts=own, device="cpu")).to_dict()
        taken = {null: fdr_selection(work, place, name, null) for null in ("sign-flip", "random")}
        told[name] = {"diagnosis": found, "selected": taken}
    return told


def fdr_selection(work: Path, place: str, name: str, null: Any) -> int:
    """How many pairs an edit by false-discovery rate would take."""
    out = store_path(work, place).parent / f"fdr-{name}-{null}.parquet"
    config = EditConfig(
        scores=str(scores_path(work, place, name)),
        behavior=BEHAVIOR,
        out=str(out),
        action="filter",
        rule=SelectionRule(fdr=FDR, null=null),
    )
    try:
        return edit(config).removed
    except ConfigError as error:
        if not any(known in str(error) for known in ("takes no pair", "sign-flip null takes the scores")):
            raise
        return 0
    finally:
        out.unlink(missing_ok=True)
        Path(config.changes).unlink(missing_ok=True)


def random_scores(work: Path, place: str, seed: int, out: Path) -> None:
    score_random(RandomConfig(store=str(store_path(work, place)), out=str(out), seed=seed))


def read_scores(work: Path, place: str, method: str, behavior: str | None = None) -> np.ndarray:
    """float64 [N]; NaN without a score."""
    column = f"score:{behavior or method}"
    read = pq.read_table(scores_path(work, place, method), columns=[column]).column(0).to_numpy(zero_copy_only=False)
    return np.asarray(read, dtype=np.float64)
