"""The behaviour stage: prompts and two checkpoints become directions in the residual stream.

rollouts -> verdicts -> four-condition filter -> rollout pairs -> `v_b = mean(p, r1; M0) - mean(p, r0; M0)` per pair,
where r1 shows the behaviour, r0 is safe, and both are read through the base model M0 (arXiv 2602.11079).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.base_reader import BaseReader
from pairtrace.engine.behavior_config import BehaviorConfig, Kinds
from pairtrace.engine.change_vectors import ChangeVectors, change_vectors
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.judge import load_rules
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.reading import Reading
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollout_table import RolloutTable
from pairtrace.engine.rollouts import journal_path, sample_rollouts
from pairtrace.engine.scenarios import Cell, Filtered, filter_scenarios, require_scenarios
from pairtrace.engine.versions import library_versions
from pairtrace.errors import ConfigError, DataMismatchError

__all__ = ["BehaviorConfig", "BehaviorSummary", "Kinds", "build_behavior", "judged_rollouts", "require_readable"]


@dataclass(frozen=True, kw_only=True)
class BehaviorSummary:
    """What `build_behavior` made.

    Attributes:
        out: the direction file.
        rollouts: the rollouts file.
        name: of the behaviour.
        directions: names in the file.
        layers: in the file.
        width: D.
        judge: whose verdicts were used.
        missing_verdicts: rollouts without a verdict.
        scenarios: prompts that went in.
        kept: scenarios in the vector.
        dropped: scenarios that were filtered out, by reason.
        rollout_pairs: pairs in the vector.
        unusable: rollout pairs that were left out, by reason.
        cells: rates per model and condition.
        seconds: wall time.
    """

    out: str
    rollouts: str
    name: str
    directions: tuple[str, ...]
    layers: tuple[int, ...]
    width: int
    judge: str
    missing_verdicts: int
    scenarios: int
    kept: int
    dropped: dict[str, int]
    rollout_pairs: int
    unusable: dict[str, int]
    cells: tuple[Cell, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values."""
        return asdict(self)


def build_behavior(config: BehaviorConfig, progress: Progress = NULL_PROGRESS) -> BehaviorSummary:
    """Build the directions of one behaviour.

    Raises:
        DataError: prompts or rollouts cannot be used, or no scenario passes the filter.
        ConfigError, ModelError, LayerError: an option or a checkpoint cannot be used.
        StoreMismatchError: `store` was made with another model, tokenizer or template, or an option contradicts it.
    """
    # Rollouts that were sampled here are there already, or part of them: this run goes on with their product.
    sampled = Path(config.rollouts_out)
    resumed = config.rollouts is None and (sampled.exists() or journal_path(sampled).exists())
    path = costs_path(config.out)
    with CostMeter(method="activation", stage="behavior", device=config.device, path=path, resumed=resumed) as meter:
        return _build(config, meter, progress)


def _build(config: BehaviorConfig, meter: CostMeter, progress: Progress) -> BehaviorSummary:
    begun = time.perf_counter()
    require_readable(config)
    reader = BaseReader.prepare(config)
    reading, prints = reader.reading, reader.prints
    table = judged_rollouts(config, prints["model_fingerprint"], progress, meter)
    filtered = filter_scenarios(table, config.max_base_rate)
    require_scenarios(filtered)
    backend = reader.load(meter)
    vectors = change_vectors(table, filtered.pairs, reader.renderer, backend, progress)
    directions = _directions(config, vectors, reading.layers, prints)
    save_directions(config.out, directions, _manifest(config, reading, table, filtered, vectors))
    return BehaviorSummary(
        out=config.out,
        rollouts=config.rollouts_out,
        name=config.direction_name,
        directions=tuple(dict.fromkeys(direction.name for direction in directions)),
        layers=reading.layers,
        width=backend.width,
        judge=str(table.manifest.get("judge", "")),
        missing_verdicts=sum(cell.missing for cell in filtered.cells),
        scenarios=filtered.scenarios,
        kept=len(vectors.scenarios),
        dropped=filtered.dropped,
        rollout_pairs=vectors.pairs,
        unusable=vectors.unusable,
        cells=filtered.cells,
        seconds=time.perf_counter() - begun,
    )


def require_readable(config: BehaviorConfig, *, mixed: bool = False) -> None:
    """Find out before a checkpoint is read that prompts and rules can be used.

    With `mixed`, distractors on some prompts only are allowed.

    Raises:
        DataFormatError, ConfigError: see `load_prompts` and `load_rules`.
    """
    load_rules(config.rules)
    if config.prompts is not None:
        load_prompts(config.prompts, mixed=mixed)


def judged_rollouts(
    config: BehaviorConfig,
    base_fingerprint: str,
    progress: Progress,
    meter: CostMeter | None = None,
    *,
    mixed: bool = False,
) -> RolloutTable:
    """Sample or read the rollouts, judge them, and keep both beside the direction file; `meter` counts the sampling.

    With `mixed`, distractors on some prompts only are allowed.

    Raises:
        DataMismatchError: the rollouts were sampled from other models, or with other prompts, than those given.
        DataError, ConfigError, ModelError: see `sample_rollouts` and `read_rollouts`.
    """
    judge = load_rules(config.rules)
    if config.rollouts is not None:
        prompts = None if config.prompts is None else load_prompts(config.prompts, mixed=mixed)
        table = read_rollouts(config.rollouts, prompts=prompts, label_column=config.label_column)
        _require_same_origin(config, table, base_fingerprint, None if prompts is None else prompts.fingerprint)
        if config.label_column is None and (config.rules is not None or not table.has_verdicts):
            table = table.judged(judge, progress)
    else:
        table = sample_rollouts(config.rollout_config, progress, meter, mixed=mixed).judged(judge, progress)
    _refuse_overwriting(table, config.rollouts_out)
    table.write(config.rollouts_out)
    return table


def _require_same_origin(
    config: BehaviorConfig, table: RolloutTable, base_fingerprint: str, prompts_fingerprint: str | None
) -> None:
    """Compare what was given with what the rollouts file says about its making; a user's own file says nothing."""
    from pairtrace.engine.vllm.adapters import fingerprint_of

    identity = table.manifest.get("identity", {})
    tuned_fingerprint = None
    if config.tuned is not None and "tuned_fingerprint" in identity:
        tuned_fingerprint = fingerprint_of(config.tuned, config.base)
    for field, what, given, expected in (
        ("base_fingerprint", "the model", f"--base {config.base}", base_fingerprint),
        ("tuned_fingerprint", "the model", f"--tuned {config.tuned}", tuned_fingerprint),
        ("prompts_fingerprint", "the prompts", str(config.prompts), prompts_fingerprint),
    ):
        actual = identity.get(field)
        if None not in (actual, expected) and actual != expected:
            raise DataMismatchError(
                f"rollouts of {config.rollouts} come from {what} with fingerprint {actual}, but {given} has "
                f"{expected}; give what they were made with, or leave it out where it is optional"
            )


def _refuse_overwriting(table: RolloutTable, path: str) -> None:
    """Rollouts cost hours: they are replaced only by the same rollouts with new verdicts."""
    if not Path(path).exists():
        return
    existing = read_rollouts(path).table
    if not existing.drop_columns(["verdict", "judge"]).equals(table.table.drop_columns(["verdict", "judge"])):
        raise ConfigError(f"{path} exists and holds other rollouts; choose another --out or move it away")


def _directions(
    config: BehaviorConfig, vectors: ChangeVectors, layers: tuple[int, ...], prints: dict[str, str]
) -> list[Direction]:
    made = []
    for position, layer in enumerate(layers):
        common: dict[str, Any] = {
            "layer": layer,
            "origin": config.out,
            "model_fingerprint": prints["model_fingerprint"],
            "tokenizer_fingerprint": prints["tokenizer_fingerprint"],
            "template_fingerprint": prints["template_fingerprint"],
        }
        name = config.direction_name
        if config.kinds in ("mean", "both"):
            mean = vectors.mean[position : position + 1]
            made.append(Direction(name=name, values=mean, kind="vector", **common))
        if config.kinds in ("bank", "both"):
            bank = np.ascontiguousarray(vectors.bank[:, position])
            made.append(Direction(name=f"{name}-bank", values=bank, kind="bank", **common))
    return made


def _manifest(
    config: BehaviorConfig,
    reading: Reading,
    table: RolloutTable,
    filtered: Filtered,
    vectors: ChangeVectors,
) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "reading": asdict(reading),
        "rollouts": table.manifest,
        "scenarios": list(vectors.scenarios),
        "rollout_pairs": vectors.pairs,
        "unusable": vectors.unusable,
        "dropped": filtered.dropped,
        "cells": [
            {
                "model": cell.model,
                "condition": cell.condition,
                "rollouts": cell.rollouts,
                "missing": cell.missing,
                "shown": cell.shown,
            }
            for cell in filtered.cells
        ],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
