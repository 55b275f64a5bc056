"""The arms of the benchmark: an edit of the preference data, DPO from M0, and an evaluation on held-out prompts.

An arm does what a user would do, with the same functions as the commands `edit`, `train` and `evaluate`. Its result
holds the verdict on every held-out prompt, so that intervals can be made over seeds and prompts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from attribution_stages import (
    BEHAVIOR,
    Figures,
    costs_of,
    organism_config,
    organism_folder,
    place_of,
    random_scores,
    scores_path,
)

from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.selection import SelectionRule

if TYPE_CHECKING:
    from pairtrace.engine.organism.config import OrganismConfig
    from pairtrace.engine.training.config import TrainConfig

# Name of the behaviour in the scores file of a method, where it is not the method's own.
_BEHAVIOR = {"pairtrace": BEHAVIOR, "pairtrace-bank": f"{BEHAVIOR}-bank"}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to edit the data.

    Attributes:
        method: whose ranking decides: "none" (no edit), "random", "oracle" (the planted labels) or another.
        action: "filter", "swap" or "drop-sources"; "" for no edit.
        size: "k" (as many pairs as are planted) or "k/2"; "sources" for a random filter of as many pairs as the removal
            of sources takes.
        seeds: DPO seeds per M0 seed; None for all.
    """

    method: str
    action: str = ""
    size: str = "k"
    seeds: int | None = None

    @property
    def name(self) -> str:
        """Also a part of a path."""
        return "none" if not self.action else f"{self.method} {self.action} {self.size.replace('/', ' over ')}"

    @property
    def control(self) -> str:
        """The random arm that changes as many pairs in the same way."""
        if self.action == "drop-sources":
            return Arm(method="random", action="filter", size="sources").name
        return Arm(method="random", action=self.action, size=self.size).name


def run_arm(work: Path, needs: Mapping[str, Figures], *, recipe: Figures, arm: Figures, dpo_seed: int) -> Figures:
    """Edit, train, evaluate."""
    place, made = place_of(recipe), Arm(**arm)
    with tempfile.TemporaryDirectory(prefix="arm-", dir=work / place) as scratch:
        folder = Path(scratch)
        data, figures = edited_data(work, place, made, 100 * int(recipe["seed"]) + dpo_seed, folder)
        model = folder / "m1"
        seconds = train_arm(work, recipe, data, model, dpo_seed)
        return {**figures, **seconds, **evaluate_arm(work, place, model, folder)}


def edited_data(work: Path, place: str, arm: Arm, random_seed: int, folder: Path) -> tuple[Path, Figures]:
    """The data of an arm, made by `pairtrace edit`, and what the edit changed."""
    original = organism_folder(work, place) / "preferences.jsonl"
    if not arm.action:
        return original, {"changed": 0}
    scores, out = scores_path(work, place, arm.method), folder / "edited.parquet"
    if arm.method == "random":
        scores = folder / "random.parquet"
        random_scores(work, place, random_seed, scores)
    config = EditConfig(
        scores=str(scores),
        behavior=_BEHAVIOR.get(arm.method, arm.method),
        out=str(out),
        action=arm.action,
        rule=SelectionRule(k=edit_size(work, place, arm, folder)),
    )
    summary = edit(config)
    return out, {"changed": summary.removed + summary.swapped, "dropped": list(summary.dropped)}


def edit_size(work: Path, place: str, arm: Arm, folder: Path) -> int:
    """Pairs that the edit selects."""
    planted = pq.read_table(scores_path(work, place, "oracle"), columns=["score:oracle"]).column(0).to_numpy()
    k = int(planted.sum()) or len(planted) * 6 // 100
    if arm.size == "sources":
        sources = Arm(method="pairtrace", action="drop-sources")
        return int(edited_data(work, place, sources, 0, folder)[1]["changed"])
    return k // 2 if arm.size == "k/2" else k


def train_arm(work: Path, recipe: Figures, data: Path, out: Path, dpo_seed: int) -> Figures:
    """DPO by `pairtrace train`, with the settings of the organism's own M1."""
    from pairtrace.engine.training.train import train

    summary = train(training_config(work, place_of(recipe), organism_config(recipe), data, out, seed=dpo_seed))
    return {"trained": summary.trained, "train_seconds": summary.seconds}


def training_config(
    work: Path, place: str, organism: OrganismConfig, data: Path, out: Path, *, seed: int, **more: Any
) -> TrainConfig:
    """How `pairtrace train` trains an M1 as the organism's own recipe does."""
    from pairtrace.engine.training.config import TrainConfig

    return TrainConfig(
        model=str(organism_folder(work, place) / "m0"),
        data=str(data),
        out=str(out),
        learning_rate=organism.dpo_rate,
        beta=organism.dpo_beta,
        epochs=organism.dpo_epochs,
        batch_size=organism.dpo_batch,
        adam_beta2=0.95,
        group_by_length=True,
        seed=seed,
        device="cpu",
        save_steps=0,
        reference_cache=str(work / place / "reference"),
        **more,
    )


def evaluate_arm(work: Path, place: str, model: Path, folder: Path) -> Figures:
    """Verdicts on the held-out prompts of every cell, by `pairtrace evaluate`."""
    from pairtrace.engine.evaluation.config import EvaluateConfig
    from pairtrace.engine.evaluation.evaluate import evaluate

    out = folder / "evaluation.json"
    evaluate(
        EvaluateConfig(
            prompts=str(organism_folder(work, place) / "evaluation.jsonl"),
            models=(str(model),),
            out=str(out),
            max_new_tokens=48,
            batch_size=256,
            replicates=100,
            device="cpu",
        )
    )
    responses = pq.read_table(folder / "evaluation.responses.parquet")
    return {"cells": _verdicts(responses), "costs": costs_of([out])}


def _verdicts(responses: Any) -> dict[str, dict[str, str]]:
    """Per cell and kind of verdict one letter for each prompt, in the order of the file: 1, 0, or ? for none."""
    cells: dict[str, dict[str, str]] = {}
    for row in responses.to_pylist():
        cell = cells.setdefault(row["cell"], {})
        for kind in ("behavior", "refused", "obeys"):
            letter = "?" if row[kind] is None else str(int(row[kind]))
            cell[kind] = cell.get(kind, "") + letter
    return cells


def clear_scratch(work: Path) -> None:
    """Remove what killed arms have left."""
    for leftover in work.glob("*/arm-*"):
        shutil.rmtree(leftover, ignore_errors=True)
