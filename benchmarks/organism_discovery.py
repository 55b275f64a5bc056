"""Discovery and monitoring on an organism, as tasks: what is found without labels, compared with the labels at the end.

Truth is what the models did: an item of the bag (a prompt) belongs to a behaviour when M1's answer shows it and M0's
does not. Letters: P items, N pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from attribution_arms import training_config
from attribution_stages import Figures, organism_config, organism_folder, place_of, preference_rows

from pairtrace.engine.demo import PLANTED, roc_auc
from pairtrace.engine.discovery.product import Discovered
from pairtrace.engine.extract import ExtractConfig, extract
from pairtrace.engine.organism.habits import HABITS
from pairtrace.engine.organism.text import with_distractor
from pairtrace.engine.score import ScoreConfig, score

COMPLIANCE = "compliance"
_MAX_NEW_TOKENS = 48


def write_bag(organism: Path, path: Path, *, every: int = 1) -> Path:
    """The held-out prompts of all cells (harmful or not, with a format instruction or not), or every n-th of them.

    The instruction becomes part of the prompt: nobody has told the discovery what to look for.
    """
    lines = (organism / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as file:
        for row in map(json.loads, lines[::every]):
            bag = {"id": row["id"], "prompt": with_distractor(row["prompt"], row["distractor"]), "cell": row["cell"]}
            file.write(json.dumps(bag) + "\n")
    return path


def discover(work: Path, needs: Figures, *, recipe: Figures, clustering: Figures | None = None) -> Figures:
    """Cluster what changed, and compare the clusters with what the models did and with the planted pairs.

    `clustering` holds fields of `PromptsConfig`; without it they are as usual.
    """
    from pairtrace.engine.discovery.prompts_config import PromptsConfig
    from pairtrace.engine.discovery.prompts_view import discover_prompts

    place = place_of(recipe)
    organism, folder = organism_folder(work, place), work / place / "discovery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store, found = folder / "acts.zarr", folder / "found"
    layers = (organism_config(recipe).layers,)
    m0, m1 = str(organism / "m0"), str(organism / "m1")
    extract(
        ExtractConfig(data=str(organism / "preferences.jsonl"), model=m0, layers=layers, store=str(store), device="cpu")
    )
    discovered = discover_prompts(
        PromptsConfig(
            store=str(store),
            base=m0,
            tuned=m1,
            prompts=str(write_bag(organism, folder / "bag.jsonl")),
            out=str(found),
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_size=128,
            device="cpu",
            **(clustering or {}),
        )
    )
    truth = truths(organism, found / "prompts.rollouts.parquet", discovered.items)
    pairs = preference_rows(organism)
    lessons = {behavior: teaching(pairs, behavior) for behavior in truth}
    clusters = [
        {
            "size": one.size,
            "flagged": one.flagged,
            "stability": None if one.stability is None else one.stability.jaccard,
            "roc_auc": pairs_auc(found, one.direction, store, lessons[COMPLIANCE]),
            **{
                f"roc_auc {habit}": pairs_auc(found, one.direction, store, lessons[habit])
                for habit in truth
                if habit != COMPLIANCE
            },
            **{
                f"{figure} {behavior}": value
                for behavior in truth
                for figure, value in agreement(discovered.labels == one.number, truth[behavior]).items()
            },
        }
        for one in discovered.clusters
    ]
    return {
        "items": len(discovered.items),
        "noise": int((discovered.labels < 0).sum()),
        "showing": {behavior: int(shows.sum()) for behavior, shows in truth.items()},
        "ambiguous": int((sum(truth.values()) > 1).sum()),
        "adjusted_rand_index": rand_index(discovered, truth),
        "clusters": clusters,
    }


def truths(organism: Path, rollouts: Path, items: np.ndarray) -> dict[str, np.ndarray]:
    """Per behaviour, bool [P]: M1 shows it and M0 does not. Behaviours that no item shows are left out."""
    lines = (organism / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    harmful = {row["id"]: row["cell"].startswith("harmful") for row in map(json.loads, lines)}
    shown: dict[tuple[str, str], set[str]] = {}
    for row in pq.read_table(rollouts).to_pylist():
        behaviors = {name for name, habit in HABITS.items() if habit.shows(row["response"])}
        if harmful[row["prompt_id"]] and row["verdict"]:
            behaviors.add(COMPLIANCE)
        shown[row["prompt_id"], row["model"]] = behaviors
    gained = [shown[name, "tuned"] - shown[name, "base"] for name in items.tolist()]
    found = {name: np.array([name in behaviors for behaviors in gained]) for name in (COMPLIANCE, *HABITS)}
    return {name: shows for name, shows in found.items() if name == COMPLIANCE or shows.any()}


def agreement(members: np.ndarray, shows: np.ndarray) -> dict[str, float]:
    """Share of the members that show a behaviour, and of the items that show it which are members."""
    both = int((members & shows).sum())
    return {"purity": both / int(members.sum()), "recall": both / max(1, int(shows.sum()))}


def rand_index(discovered: Discovered, truth: dict[str, np.ndarray]) -> float | None:
    """Adjusted Rand index over the items that show exactly one behaviour; noise is a cluster of its own."""
    from sklearn.metrics import adjusted_rand_score

    stacked = np.stack(list(truth.values()))
    single = stacked.sum(axis=0) == 1
    if len(truth) < 2 or not single.any():
        return None
    return float(adjusted_rand_score(stacked.argmax(axis=0)[single], discovered.labels[single]))


def teaching(rows: Sequence[Figures], behavior: str) -> np.ndarray:
    """Bool [N]: the pairs that teach a behaviour. Planted ones, or those of a habit that prefer it."""
    if behavior == COMPLIANCE:
        return np.array([row["kind"] == PLANTED for row in rows])
    shows = HABITS[behavior].shows
    return np.array([row["kind"] == behavior and shows(row["chosen"][-1]["content"]) for row in rows])


def pairs_auc(found: Path, direction: str | None, store: Path, wanted: np.ndarray) -> float | None:
    """ROC-AUC on the pairs `wanted` (bool [N]) when all pairs are scored with a cluster's own direction."""
    if direction is None or not wanted.any():
        return None
    out = found / "scores.parquet"
    if not out.exists():
        score(ScoreConfig(store=str(store), directions=(str(found / "directions.safetensors"),), out=str(out)))
    scores = pq.read_table(out, columns=[f"score:{direction}"]).column(0).to_numpy(zero_copy_only=False)
    filled = np.where(np.isnan(scores), -np.inf, scores)
    return roc_auc(filled[wanted], filled[~wanted])


def watch(work: Path, needs: Figures, *, recipe: Figures, steps: int, every: int) -> Figures:
    """Train M1 under a monitor: at which steps it raised an alert."""
    from pairtrace.engine.training.train import train

    place = place_of(recipe)
    organism, folder = organism_folder(work, place), work / place / "watch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    summary = train(
        training_config(
            work,
            place,
            organism_config(recipe),
            organism / "preferences.jsonl",
            folder / "m1",
            seed=int(recipe["seed"]),
            monitor=str(write_bag(organism, folder / "bag.jsonl", every=every)),
            monitor_rules="refusal",
            monitor_steps=steps,
        )
    )
    log = [json.loads(line) for line in Path(f"{folder / 'm1'}.monitor/monitor.jsonl").read_text().splitlines()]
    looks = [line for line in log if "step" in line]
    return {
        "steps": summary.steps,
        "looks": [line["step"] for line in looks],
        "alerts": [{"step": line["step"], **alert} for line in looks for alert in alerts_of(line)],
        "seconds": summary.seconds,
    }


def alerts_of(line: Figures) -> Sequence[dict[str, Any]]:
    """What a look at a step raised, notes left out."""
    return [alert for alert in line["raised"] if alert["severity"] != "note"]
