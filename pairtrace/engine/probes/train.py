"""Training probes: a logistic regression per layer, judged on prompts that it has not seen.

Legend: n examples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np

from pairtrace.engine.atomic import require_writable
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.probes.config import ExamplesConfig, ProbeTrainConfig
from pairtrace.engine.probes.examples import Examples
from pairtrace.engine.probes.figures import Figures, figures_of
from pairtrace.engine.probes.grouping import CrossValidation, held_out_prompts, require_examples
from pairtrace.engine.probes.layer_training import LayerTraining, train_layer
from pairtrace.engine.probes.probe_file import Probe, Role, save_probes
from pairtrace.engine.probes.solver import require_solver
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.versions import library_versions

logger = logging.getLogger(__name__)

__all__ = ["ProbeResult", "ProbeTraining", "open_examples", "train_probes"]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe, and how good it is on prompts kept out of training.

    Attributes:
        name, layer, role, members: of the probe.
        strength: C; None for the baseline.
        figures: on the held-out prompts.
    """

    name: str
    layer: int
    role: Role
    members: int
    strength: float | None
    figures: Figures


@dataclass(frozen=True, kw_only=True)
class ProbeTraining:
    """What `train_probes` made.

    Attributes:
        out: the probe file.
        name: of the behaviour.
        layers: in the file.
        best_layer: with the smallest loss in cross-validation. Held-out prompts have no part in this choice, so that
            their figures stay honest.
        examples, positives, prompts: that went in; positives are those of class 1.
        training_examples, held_out_examples: on either side of the split by prompts.
        solved_examples: that the solver was given, at each layer.
        left_out: examples that could not be used, by reason.
        probes: by layer.
        cross_validation: by layer.
        seconds: wall time.
    """

    out: str
    name: str
    layers: tuple[int, ...]
    best_layer: int
    examples: int
    positives: int
    prompts: int
    training_examples: int
    held_out_examples: int
    solved_examples: int
    left_out: dict[str, int]
    probes: tuple[ProbeResult, ...]
    cross_validation: dict[int, CrossValidation]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def open_examples(config: ExamplesConfig, meter: CostMeter, progress: Progress) -> Examples:
    """The examples that `config` names; rollouts are read through their model now.

    Raises:
        StoreError, DataError, ModelError, ConfigError, LayerError, ExamplesError: they cannot be used.
    """
    if config.store is None:
        from pairtrace.engine.probes.rollout_examples import RolloutExamples

        return RolloutExamples.read(config, meter, progress)
    from pairtrace.engine.probes.store_examples import StoreExamples

    return StoreExamples.open(
        config.store,
        data=config.data,
        label_column=config.label_column,
        side=config.side,
        layers=config.layers,
        allow_incomplete=config.allow_incomplete,
    )


def train_probes(
    config: ProbeTrainConfig, progress: Progress = NULL_PROGRESS, *, examples: Examples | None = None
) -> ProbeTraining:
    """Train probes at every layer and write them.

    Args:
        config: what to do.
        progress: receives a stage per layer.
        examples: instead of those that `config` names.

    Raises:
        ExamplesError: one class only, too few examples, activations or labels that cannot be used.
        ProbeError: the solver does not converge.
        StoreError, DataError, ModelError, ConfigError, LayerError: see `open_examples`.
        MissingDependencyError: scikit-learn is not installed.
    """
    begun = time.perf_counter()
    require_writable(config.out)
    require_solver()
    device = "cpu" if config.store is not None else config.device
    with CostMeter(method="probe", stage="train", device=device, path=costs_path(config.out)) as meter:
        examples = examples or open_examples(config, meter, progress)
        labels, prompts = examples.labels, examples.prompts
        # Of each class a prompt for every fold, and one to judge by.
        require_examples(labels, prompts, config.folds + 1, examples.origin.name)
        held_out = held_out_prompts(labels, prompts, config.test_share, config.seed)
        require_examples(labels[~held_out], prompts[~held_out], config.folds, f"{examples.origin.name}, training part")
        require_examples(labels[held_out], prompts[held_out], 1, f"{examples.origin.name}, held-out part")
        solved = _drawn(np.flatnonzero(~held_out), config.max_rows, config.seed)
        require_examples(labels[solved], prompts[solved], config.folds, f"{len(solved)} examples of --max-rows")
        probes: list[Probe] = []
        results: list[ProbeResult] = []
        validations: dict[int, CrossValidation] = {}
        progress.start("train probes", 2 * len(examples.layers), "passes")
        for layer in examples.layers:
            trained = train_layer(config, examples, layer, ~held_out, solved)
            progress.advance(1)
            results += _judged(config, examples, held_out, trained)
            progress.advance(1)
            probes += trained.probes
            validations[layer] = trained.validation
        progress.finish()
        training = ProbeTraining(
            out=config.out,
            name=config.probe_name,
            layers=tuple(examples.layers),
            best_layer=min(validations, key=lambda one: min(validations[one].losses.values())),
            examples=len(labels),
            positives=int((labels == 1).sum()),
            prompts=int(prompts.max()) + 1,
            training_examples=int((~held_out).sum()),
            held_out_examples=int(held_out.sum()),
            solved_examples=len(solved),
            left_out={reason: count for reason, count in examples.left_out.items() if count},
            probes=tuple(results),
            cross_validation=validations,
            seconds=time.perf_counter() - begun,
        )
        save_probes(
            config.out,
            probes,
            {
                "config": asdict(config),
                "origin": examples.origin.description,
                "training": training.to_dict(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": {**library_versions(), "scikit-learn": metadata.version("scikit-learn")},
            },
            trained_on=np.unique(examples.contents[~held_out]),
        )
    return training


def _drawn(positions: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many positions, drawn at random, ascending."""
    if len(positions) <= most:
        return positions
    logger.info(
        "the solver is given %d of %d examples, drawn at random; --max-rows gives it more", most, len(positions)
    )
    drawn: np.ndarray = np.sort(np.random.default_rng(seed).permutation(positions)[:most])
    return drawn


def _judged(
    config: ProbeTrainConfig, examples: Examples, held_out: np.ndarray, trained: LayerTraining
) -> Iterator[ProbeResult]:
    """Figures of the probes of a layer on the examples kept out, bool [n]."""
    probabilities = np.full((len(trained.probes), len(held_out)), np.nan)
    for positions, rows in examples.blocks(trained.layer):
        inside = held_out[positions]
        for number, probe in enumerate(trained.probes):
            probabilities[number, positions[inside]] = probe.probabilities(rows[inside])
    for number, probe in enumerate(trained.probes):
        yield ProbeResult(
            name=probe.name,
            layer=probe.layer,
            role=probe.role,
            members=probe.members,
            strength=None if probe.role == "baseline" else trained.validation.strength,
            figures=figures_of(
                probabilities[number, held_out],
                examples.labels[held_out],
                examples.prompts[held_out],
                confidence=config.confidence,
                bins=config.bins,
            ),
        )
