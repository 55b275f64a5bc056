"""The probes of one layer: a single one or an ensemble, held-out ones, and the difference of means as the baseline.

Legend: n examples, m of them that the solver is given, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.probes.config import ProbeTrainConfig
from pairtrace.engine.probes.examples import Examples
from pairtrace.engine.probes.grouping import CrossValidation, cross_validate, member_weights
from pairtrace.engine.probes.probe_file import Probe, Role
from pairtrace.engine.probes.solver import Fitted, Moments, Standardisation, fit
from pairtrace.errors import ExamplesError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerTraining:
    """What was trained at one layer.

    Attributes:
        layer: the residual layer.
        validation: how regularisations compare.
        probes: the probe or ensemble, held-out probes, baseline, in this order.
    """

    layer: int
    validation: CrossValidation
    probes: tuple[Probe, ...]


def train_layer(
    config: ProbeTrainConfig, examples: Examples, layer: int, training: np.ndarray, solved: np.ndarray
) -> LayerTraining:
    """Train the probes of a layer, with one pass over its examples.

    Args:
        config: what to train.
        examples: n of them.
        layer: of the examples.
        training: bool [n], the examples that may be learned from.
        solved: int64 [m], ascending, those of them that the solver is given.

    Raises:
        ExamplesError: activations are not finite, or the classes have the same mean.
        ProbeError: the solver does not converge.
    """
    sample = _gathered(examples, layer, training, solved)
    validation = cross_validate(
        sample.features, sample.labels, sample.prompts, config.strengths, config.folds, config.seed
    )
    if validation.at_the_edge:
        logger.info("layer %d: the best C, %g, is at the edge of --strengths", layer, validation.strength)
    if config.members == 1:
        members = [fit(sample.features, sample.labels, validation.strength, sample.standardisation)]
    else:
        members = [_member(config, sample, validation.strength, number) for number in range(config.members)]
    # The held-out ones have draws that no member of the ensemble has had.
    held_out = [
        _member(config, sample, validation.strength, config.members + number) for number in range(config.hold_out)
    ]
    named: list[tuple[str, Role, list[Fitted]]] = [
        (config.probe_name, "training", members),
        *((f"{config.probe_name}-held-out-{number}", "held-out", [one]) for number, one in enumerate(held_out, 1)),
        (f"{config.probe_name}-mean-difference", "baseline", [_scaled(sample, layer)]),
    ]
    probes = tuple(
        Probe(
            name=name,
            layer=layer,
            role=role,
            weight=np.stack([one.weight for one in fitted]),
            bias=np.array([one.bias for one in fitted]),
            origin=config.out,
            **examples.origin.prints,
        )
        for name, role, fitted in named
    )
    return LayerTraining(layer=layer, validation=validation, probes=probes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """What the solver is given, and what is known of all examples that may be learned from.

    Attributes:
        features: float32 [m, D].
        labels: int8 [m].
        prompts: int64 [m].
        standardisation: of all of them.
        difference: float64 [D], mean of class 1 minus mean of class 0, of all of them.
    """

    features: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray
    standardisation: Standardisation
    difference: np.ndarray


def _gathered(examples: Examples, layer: int, training: np.ndarray, solved: np.ndarray) -> _Sample:
    features = np.empty((len(solved), examples.width), np.float32)
    overall, zero, one = (Moments(examples.width) for _ in range(3))
    for positions, rows in examples.blocks(layer):
        labels, inside = examples.labels[positions], training[positions]
        overall.add(rows[inside])
        zero.add(rows[inside & (labels == 0)])
        one.add(rows[inside & (labels == 1)])
        places = np.minimum(np.searchsorted(solved, positions), len(solved) - 1)
        wanted = solved[places] == positions
        features[places[wanted]] = rows[wanted]
    return _Sample(
        features=features,
        labels=examples.labels[solved],
        prompts=examples.prompts[solved],
        standardisation=overall.standardisation(),
        difference=one.mean - zero.mean,
    )


def _member(config: ProbeTrainConfig, sample: _Sample, strength: float, number: int) -> Fitted:
    """A probe on prompts of its own draw, standardised by them."""
    # Apart from the draws of the split and of the subsample.
    seed = int(np.random.SeedSequence([config.seed, 1, number]).generate_state(1)[0])
    weights = member_weights(sample.labels, sample.prompts, config.vary, seed)
    moments = Moments(sample.features.shape[1])
    moments.add(sample.features, weights)
    return fit(sample.features, sample.labels, strength, moments.standardisation(), weights)


def _scaled(sample: _Sample, layer: int) -> Fitted:
    """The difference of means made to give probabilities: a logistic regression on the projection alone.

    (J. Platt, "Probabilistic outputs for support vector machines", 1999; instead of his smoothing of the targets the
    slope is regularised, at C = 1, so that it stays finite where the projection separates the classes.)
    """
    length = float(np.linalg.norm(sample.difference))
    if length == 0:
        raise ExamplesError(f"layer {layer}: both classes have the same mean activation", "two means", "one")
    unit = sample.difference / length
    projections = (sample.features.astype(np.float64) @ unit)[:, None]
    moments = Moments(1)
    moments.add(projections)
    slope = fit(projections, sample.labels, 1.0, moments.standardisation())
    exact = float(slope.weight[0]) * unit
    weight = exact.astype(np.float32)
    # As in `solver.folded`: what rounding moves at the mean of the examples is taken back.
    moved = (weight.astype(np.float64) - exact) @ sample.features.mean(axis=0, dtype=np.float64)
    return Fitted(weight=weight, bias=slope.bias - float(moved))
