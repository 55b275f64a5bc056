"""Splits by prompt: responses to one prompt resemble each other, so a prompt is never on both sides.

Legend: n examples, P prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.probes.solver import ROUGH, Moments, fit
from pairtrace.errors import ExamplesError

# The part of the prompts that a member of an ensemble "by seeds" is trained on.
SEED_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """How regularisations compare.

    Attributes:
        strength: the best C.
        losses: mean log loss per example, over the folds that it was held out from, by C.
        folds: how many.
    """

    strength: float
    losses: dict[float, float]
    folds: int

    @property
    def at_the_edge(self) -> bool:
        """Whether the best C is the smallest or largest of several: one beyond may be better."""
        return len(self.losses) > 1 and self.strength in (min(self.losses), max(self.losses))


def require_examples(labels: np.ndarray, prompts: np.ndarray, needed: int, where: str) -> None:
    """Check that both classes are there, each with examples of enough prompts.

    Args:
        labels: [n], 0 or 1.
        prompts: int64 [n], number of the prompt.
        needed: prompts that each class needs.
        where: what the examples come from, for the message.

    Raises:
        ExamplesError: they are not.
    """
    counts = [len(np.unique(prompts[labels == one])) for one in (0, 1)]
    if not all(counts):
        only = (
            "no example" if not any(counts) else f"{len(labels)} examples of the class {int(np.argmax(counts))} alone"
        )
        raise ExamplesError(f"{where}: a probe tells two classes apart", "examples of the classes 0 and 1", only)
    if min(counts) < needed:
        raise ExamplesError(
            f"{where}: too few examples; every fold and the held-out part need prompts of both classes",
            f"at least {needed} prompts with an example of the class 0, and as many of the class 1",
            f"{counts[0]} and {counts[1]}",
        )


def held_out_prompts(labels: np.ndarray, prompts: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose prompts to keep out of training.

    Drawn apart among the prompts with examples of class 0 only, of class 1 only, and of both: so that both classes are
    on both sides.

    Args:
        labels: [n], 0 or 1.
        prompts: int64 [n], 0 to P - 1.
        share: of the prompts, between 0 and 1; at least one of each kind that has several.
        seed: of the draw.

    Returns:
        bool [n], the examples of the chosen prompts.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(int(prompts.max()) + 1, bool)
    for members in _kinds(labels, prompts):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    result: np.ndarray = chosen[prompts]
    return result


def member_weights(labels: np.ndarray, prompts: np.ndarray, vary: str, seed: int) -> np.ndarray:
    """How often each example counts for one member of an ensemble.

    Args:
        labels, prompts: as for `held_out_prompts`; as many prompts of each kind are drawn as there are.
        vary: "bootstrap": prompts drawn with replacement; "seeds": four fifths of them, drawn without. (The problem is
            convex: a seed that changed nothing about the examples would change nothing about the probe.)
        seed: of the draw.

    Returns:
        float64 [n].
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros(int(prompts.max()) + 1)
    for members in _kinds(labels, prompts):
        if vary == "bootstrap":
            counts[members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)))
        else:
            counts[rng.permutation(members)[: max(1, round(SEED_SHARE * len(members)))]] = 1
    result: np.ndarray = counts[prompts]
    return result


def _kinds(labels: np.ndarray, prompts: np.ndarray) -> Iterator[np.ndarray]:
    """The prompts of each kind: those with examples of class 0 only, of class 1 only, of both."""
    total = int(prompts.max()) + 1
    has = [np.bincount(prompts[labels == one], minlength=total) > 0 for one in (0, 1)]
    for kind in (has[0] & ~has[1], has[1] & ~has[0], has[0] & has[1]):
        members = np.flatnonzero(kind)
        if members.size:
            yield members


def folds_of(labels: np.ndarray, prompts: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to train on and to judge by, `folds` times; every example is judged by once.

    Folds keep the classes as even as whole prompts allow (scikit-learn's `StratifiedGroupKFold`).
    """
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for train, judge in splitter.split(np.zeros(len(labels)), labels, prompts):
        assert not np.isin(prompts[judge], prompts[train]).any(), "a prompt is on both sides"
        yield train, judge


def cross_validate(
    features: np.ndarray, labels: np.ndarray, prompts: np.ndarray, strengths: Sequence[float], folds: int, seed: int
) -> CrossValidation:
    """Find the regularisation with the smallest log loss on prompts that a fit has not seen.

    Columns are standardised within each fold by what is trained on.

    Args:
        features: float [n, D], finite.
        labels: [n], 0 or 1.
        prompts: int64 [n], number of the prompt.
        strengths: values of C to compare.
        folds: how many; each class needs as many prompts.
        seed: of the folds.

    Raises:
        ExamplesError: a fold leaves one class only to train on.
        ProbeError: the solver does not converge.
    """
    sums = dict.fromkeys(sorted(strengths), 0.0)
    for train, judge in folds_of(labels, prompts, folds, seed):
        require_examples(labels[train], prompts[train], 1, f"one of {folds} folds")
        moments = Moments(features.shape[1])
        moments.add(features[train])
        standardisation = moments.standardisation()
        for strength in sums:
            found = fit(features[train], labels[train], strength, standardisation, tolerance=ROUGH)
            logits = features[judge].astype(np.float64) @ found.weight.astype(np.float64) + found.bias
            sums[strength] += float(np.logaddexp(0.0, np.where(labels[judge] == 1, -logits, logits)).sum())
    losses = {strength: total / len(labels) for strength, total in sums.items()}
    return CrossValidation(strength=min(losses, key=lambda one: losses[one]), losses=losses, folds=folds)
