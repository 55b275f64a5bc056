"""How far rankings agree: those of bootstrap samples of the behaviour, and those of other layers.

Legend: n pairs, k of them in the top, R bootstrap samples, S scenarios (prompts) of P rollout pairs, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairtrace.engine.diagnosis.confounding import top_pairs
from pairtrace.engine.diagnosis.sweep import Group
from pairtrace.engine.fidelity import spearman

# Banks resampled by rollouts share no direction; so many in all, and so few banks at least.
_MOST_DIRECTIONS, _FEWEST_BANKS = 2048, 8


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and the range that holds 95 % of some values.

    Attributes:
        value: the median.
        low, high: 2.5 % and 97.5 % quantiles.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Of float [n]."""
        low, middle, high = np.quantile(values, (0.025, 0.5, 0.975)).tolist()
        return cls(value=middle, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Agreement of the rankings of two independent bootstrap samples, over many such pairs of samples.

    Attributes:
        over: what was resampled: "prompts" or "rollouts".
        drawn_from: number of prompts, or of rollout pairs.
        samples: bootstrap samples; they are compared two by two.
        spearman: rank correlation of their scores.
        top_overlap: share of the top that both have.
    """

    over: str
    drawn_from: int
    samples: int
    spearman: Spread
    top_overlap: Spread


@dataclass(frozen=True, kw_only=True)
class LayerAgreement:
    """Agreement of another layer's ranking with the one that was scored.

    Attributes:
        layer: the other layer.
        spearman: rank correlation of the scores.
        top_overlap: share of the top that both have.
    """

    layer: int
    spearman: float
    top_overlap: float


def resampled_prompts(bank: np.ndarray, kind: str, samples: int, rng: np.random.Generator) -> Group:
    """Behaviours made from prompts drawn with replacement.

    Args:
        bank: float32 [S, D], one vector per prompt.
        kind: "vector": the behaviour is the mean of the drawn vectors; "bank": a score is the maximum over them.
        samples: R.
        rng: of the draws.
    """
    draws = rng.integers(0, len(bank), (samples, len(bank)))
    if kind == "bank":
        return Group(directions=bank, members=tuple(np.unique(draw) for draw in draws))
    return Group.of_vectors(np.stack([bank[draw].mean(axis=0) for draw in draws]))


def resampled_rollouts(
    vectors: np.ndarray, scenarios: np.ndarray, kind: str, samples: int, rng: np.random.Generator
) -> Group:
    """Behaviours made from rollout pairs drawn with replacement within each prompt.

    Args:
        vectors: float32 [P, D], one per rollout pair.
        scenarios: int64 [P], number of its prompt, 0 to S - 1, every one with at least one pair.
        kind: as for `resampled_prompts`.
        samples: R; for banks as many as fit, at least 8.
        rng: of the draws.
    """
    if kind == "bank":
        samples = max(_FEWEST_BANKS, min(samples, _MOST_DIRECTIONS // (int(scenarios.max()) + 1)))
    order = np.argsort(scenarios, kind="stable")
    counts = np.bincount(scenarios)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.repeat(counts, counts)
    drawn = [vectors[order[starts + (rng.random(len(order)) * sizes).astype(np.int64)]] for _ in range(samples)]
    if kind == "vector":
        return Group.of_vectors(np.stack([one.mean(axis=0) for one in drawn]))
    edges = np.cumsum(counts) - counts
    return Group.of_banks(np.stack([np.add.reduceat(one, edges) / counts[:, None] for one in drawn]))


def stability(over: str, drawn_from: int, scores: np.ndarray, k: int) -> Stability:
    """Compare samples two by two, so that no comparison shares a sample with another.

    Args:
        over: what was resampled.
        drawn_from: how many of them there are.
        scores: float32 [n, R].
        k: size of the top.
    """
    compared = [agreement(scores[:, one], scores[:, one + 1], k) for one in range(0, scores.shape[1] - 1, 2)]
    correlations, overlaps = np.array(compared).T
    return Stability(
        over=over,
        drawn_from=drawn_from,
        samples=scores.shape[1],
        spearman=Spread.of(correlations),
        top_overlap=Spread.of(overlaps),
    )


def agreement(first: np.ndarray, second: np.ndarray, k: int) -> tuple[float, float]:
    """Rank correlation and share of the top k in common, of the pairs that have both scores, float [n].

    Scores that do not vary order nothing: their correlation counts as 0.
    """
    both = np.isfinite(first) & np.isfinite(second)
    one, other = first[both], second[both]
    shared = np.count_nonzero(top_pairs(one, k) & top_pairs(other, k))
    correlation = spearman(one, other)
    return correlation or 0.0, shared / min(k, max(1, len(one)))
