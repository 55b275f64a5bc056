"""How well probes detect a behaviour in a model's activations: old probes, and probes trained on this model.

Legend: n examples, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pairtrace.engine.detectability.config import DetectabilityConfig
from pairtrace.engine.detectability.figures import Figure
from pairtrace.engine.probes.config import ProbeTrainConfig
from pairtrace.engine.probes.evaluate import examples_trained_on
from pairtrace.engine.probes.examples import Examples
from pairtrace.engine.probes.figures import area_of
from pairtrace.engine.probes.grouping import held_out_prompts, require_examples
from pairtrace.engine.probes.layer_training import train_layer
from pairtrace.engine.probes.probe_file import Probe
from pairtrace.errors import ExamplesError

_ROLES = ("training", "held-out", "baseline")
RETRAINED = "retrained"


def split_examples(
    config: DetectabilityConfig, examples: Examples, digests: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Examples to train new probes on, and examples of other prompts to measure all probes on.

    Args:
        config: how.
        examples: n of them.
        digests: uint64 of the prompts that the old probes were trained on; these are never measured on.

    Returns:
        bool [n] each.

    Raises:
        ExamplesError: too few examples or prompts of a class, on either side.
    """
    known = examples_trained_on(examples, digests)
    learned, judged = known, ~known
    if not _enough(examples, known, config.folds):
        judged = held_out_prompts(examples.labels, examples.prompts, config.judged_share, config.seed) & ~known
        learned = ~judged
    name = examples.origin.name
    for part, needed, what in ((learned, config.folds, "to train new probes"), (judged, 1, "to measure probes")):
        where = f"{name}, part {what} (prompts new to the probes are measured on)"
        require_examples(examples.labels[part], examples.prompts[part], needed, where)
    return learned, judged


def _enough(examples: Examples, part: np.ndarray, folds: int) -> bool:
    """Whether a part has the prompts of both classes that training needs."""
    try:
        require_examples(examples.labels[part], examples.prompts[part], folds, "")
    except ExamplesError:
        return False
    return True


def probe_areas(
    config: DetectabilityConfig, examples: Examples, probes: Sequence[Probe], learned: np.ndarray, judged: np.ndarray
) -> tuple[dict[str, Figure], dict[str, float | None]]:
    """Areas under the ROC curve.

    Args:
        config: level of the intervals, and how new probes are trained.
        examples: n of them, with the activations of one model.
        probes: the old ones, at some layers.
        learned, judged: bool [n], see `split_examples`.

    Returns:
        By role ("training", "held-out", "baseline", "retrained") the area of the mean probability over its probes and
        layers; and of every single probe, by name and layer.

    Raises:
        ExamplesError: activations are not finite, or a new probe cannot be trained.
        ProbeError: the solver does not converge.
    """
    training = ProbeTrainConfig(
        out="retrained.safetensors", rollouts=config.rollouts, model=config.before, folds=config.folds, seed=config.seed
    )
    probabilities: dict[str, list[np.ndarray]] = {}
    single: dict[str, float | None] = {}
    labels, prompts = examples.labels[judged], examples.prompts[judged]
    for layer in sorted({probe.layer for probe in probes}):
        rows = np.concatenate([block for _, block in examples.blocks(layer)])
        order = np.argsort(np.concatenate([positions for positions, _ in examples.blocks(layer)]))
        rows = rows[order][judged]
        new = train_layer(training, examples, layer, learned, np.flatnonzero(learned)).probes[0]
        of_layer = [(probe.role, probe) for probe in probes if probe.layer == layer]
        for role, probe in [*of_layer, (RETRAINED, new)]:
            found = probe.probabilities(rows)
            probabilities.setdefault(role, []).append(found)
            name = role if role == RETRAINED else probe.name
            single[f"{name}/{layer}"] = area_of(found, labels, prompts, config.confidence).value
    figures = {}
    for role in (*_ROLES, RETRAINED):
        if role in probabilities:
            area = area_of(np.mean(probabilities[role], axis=0), labels, prompts, config.confidence)
            figures[role] = Figure(value=area.value, low=area.low, high=area.high)
    return figures, single
