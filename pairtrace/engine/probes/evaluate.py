"""How good probes are on any model's activations, for example those of a model that was trained against them.

Legend: n examples.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pairtrace.engine.atomic import replacing, require_writable
from pairtrace.engine.cost import CostMeter, costs_path
from pairtrace.engine.probes.config import ProbeEvalConfig
from pairtrace.engine.probes.examples import Examples, reasons_text
from pairtrace.engine.probes.figures import Figures, figures_of
from pairtrace.engine.probes.probe_file import Probe, Role, load_probes, trained_prompts
from pairtrace.engine.probes.train import open_examples
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ExamplesError, ProbeMismatchError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProbeFigures:
    """One probe on the examples.

    Attributes:
        name, role, members: of the probe.
        layer: of the probe; None for the mean probability over all its layers.
        figures: see `Figures`.
    """

    name: str
    role: Role
    members: int
    layer: int | None
    figures: Figures


@dataclass(frozen=True, kw_only=True)
class ProbeEvaluation:
    """What `evaluate_probes` found.

    Attributes:
        probe: the probe file.
        activations: store or rollouts file.
        same_model: whether the activations come from the model that the probes were trained on.
        examples: that were used.
        trained_on: examples that were left out because the probes were trained on their prompts.
        left_out: examples that could not be used, by reason.
        probes: by name and layer.
        seconds: wall time.
    """

    probe: str
    activations: str
    same_model: bool
    examples: int
    trained_on: int
    left_out: dict[str, int]
    probes: tuple[ProbeFigures, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def find(self, name: str, layer: int | None) -> Figures:
        """The figures of one probe.

        Raises:
            KeyError: there is none.
        """
        found = [one.figures for one in self.probes if (one.name, one.layer) == (name, layer)]
        if not found:
            raise KeyError(f"{name}, layer {layer}")
        return found[0]


def evaluate_probes(
    config: ProbeEvalConfig, progress: Progress = NULL_PROGRESS, *, examples: Examples | None = None
) -> ProbeEvaluation:
    """Measure probes on labelled examples.

    The activations may come from another model than the probes, as long as width and tokenizer are the same: that is
    how detectability after training is measured. Examples whose prompts the probes were trained on are left out.

    Args:
        config: what to do.
        progress: receives a stage.
        examples: instead of those that `config` names.

    Raises:
        DirectionError: the probe file cannot be used.
        ProbeMismatchError: the probes have another width or tokenizer, or no such layer or role.
        ExamplesError: no example is left, or activations or labels cannot be used.
        StoreError, DataError, ModelError, ConfigError, LayerError: see `open_examples`.
    """
    begun = time.perf_counter()
    if config.out is not None:
        require_writable(config.out)
    probes = load_probes(config.probe, layers=config.layers, roles=config.roles or None)
    layers = tuple(sorted({probe.layer for probe in probes}))
    device = "cpu" if config.store is not None else config.device
    path = None if config.out is None else costs_path(config.out)
    with CostMeter(method="probe", stage="evaluate", device=device, path=path) as meter:
        examples = examples or open_examples(replace(config, layers=layers), meter, progress)
        if not len(examples.labels):
            reasons = reasons_text(examples.left_out) or "none"
            raise ExamplesError(f"{examples.origin.name}: nothing to evaluate probes on", "examples", reasons)
        same_model = require_fit(config.probe, probes, examples)
        usable = np.ones(len(examples.labels), bool)
        if not config.include_training:
            usable = ~examples_trained_on(examples, trained_prompts(config.probe))
        if not usable.any():
            raise ExamplesError(
                f"{examples.origin.name}: the probes were trained on the prompts of all {len(usable)} examples; "
                "--include-training uses them all the same",
                "examples of other prompts",
                "none",
            )
        progress.start("evaluate probes", len(layers), "layers")
        probabilities = np.full((len(probes), len(usable)), np.nan)
        for layer in layers:
            for positions, rows in examples.blocks(layer):
                for number, probe in enumerate(probes):
                    if probe.layer == layer:
                        probabilities[number, positions] = probe.probabilities(rows)
            progress.advance(1)
        progress.finish()
        found = ProbeEvaluation(
            probe=config.probe,
            activations=examples.origin.name,
            same_model=same_model,
            examples=int(usable.sum()),
            trained_on=int((~usable).sum()),
            left_out={reason: count for reason, count in examples.left_out.items() if count},
            probes=tuple(_figures(config, probes, examples, probabilities, usable)),
            seconds=time.perf_counter() - begun,
        )
    if config.out is not None:
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def require_fit(path: str, probes: Sequence[Probe], examples: Examples) -> bool:
    """Whether model and probes are of one checkpoint.

    Args:
        path: of the probes, for messages.
        probes: at least one, all of this file.
        examples: with the activations of the model.

    Raises:
        ProbeMismatchError: they cannot belong together: another width, or another tokenizer.
    """
    origin = examples.origin
    for probe in probes:
        for what, needed, actual in (
            ("width", examples.width, probe.width),
            ("tokenizer fingerprint", origin.tokenizer_fingerprint, probe.tokenizer_fingerprint),
        ):
            if actual is not None and actual != needed:
                raise ProbeMismatchError(
                    f"{path}: the probe {probe.name!r} belongs to another {what} than {origin.name}", needed, actual
                )
    if probes[0].template_fingerprint not in (None, origin.template_fingerprint):
        logger.warning(
            "%s was trained with another chat template (%s) than %s was read with (%s)",
            path, probes[0].template_fingerprint, origin.name, origin.template_fingerprint,
        )  # fmt: skip
    return probes[0].model_fingerprint == origin.model_fingerprint


def examples_trained_on(examples: Examples, digests: np.ndarray) -> np.ndarray:
    """bool [n]: examples of prompts with content that is among the digests (uint64), under whichever condition."""
    seen = np.zeros(int(examples.prompts.max()) + 1, bool)
    seen[examples.prompts[np.isin(examples.contents, digests)]] = True
    result: np.ndarray = seen[examples.prompts]
    return result


def _figures(
    config: ProbeEvalConfig, probes: list[Probe], examples: Examples, probabilities: np.ndarray, usable: np.ndarray
) -> Iterator[ProbeFigures]:
    """Of every probe, and of the mean over the layers where a name has several; probabilities are [probes, n]."""
    for name in dict.fromkeys(probe.name for probe in probes):
        members = [number for number, probe in enumerate(probes) if probe.name == name]
        columns: list[tuple[int | None, np.ndarray]] = [
            (probes[number].layer, probabilities[number]) for number in members
        ]
        if len(members) > 1:
            columns.append((None, probabilities[members].mean(axis=0)))
        for layer, values in columns:
            yield ProbeFigures(
                name=name,
                role=probes[members[0]].role,
                members=probes[members[0]].members,
                layer=layer,
                figures=figures_of(
                    values[usable],
                    examples.labels[usable],
                    examples.prompts[usable],
                    confidence=config.confidence,
                    bins=config.bins,
                ),
            )
