"""Figures with intervals: rates over seeds and prompts, reductions against a control, quality of rankings.

Intervals are percentile bootstraps that resample M0 seeds first, then what lies within them: DPO seeds and prompts for
rates, pairs for rankings. All arms are resampled alike, so their differences are paired. With three M0 seeds such an
interval is rough, and rather too narrow.

Legend: A arms, S M0 seeds, R DPO seeds, P prompts, N pairs, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pairtrace.engine.demo import ranking_figures

DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over all seeds and its bootstrap distribution."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        if np.isnan(self.draws).all():
            return float("nan"), float("nan")
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(self.draws, (tail, 1 - tail)).tolist()
        return low, high

    def to_dict(self) -> dict[str, float]:
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high}

    def minus(self, other: Estimate) -> Estimate:
        return Estimate(value=self.value - other.value, draws=self.draws - other.draws)

    def reduction_from(self, control: Estimate) -> Estimate:
        """The share of the control's rate that is gone."""
        where = np.where(control.draws > 0, control.draws, np.nan)
        value = 1 - self.value / control.value if control.value > 0 else float("nan")
        return Estimate(value=value, draws=1 - self.draws / where)


def rates(verdicts: Mapping[str, Sequence[Sequence[np.ndarray]]], *, draws: int = DRAWS) -> dict[str, Estimate]:
    """The rate of every arm.

    Args:
        verdicts: per arm, S lists of R arrays [P] of 0, 1 and NaN (no verdict). Every arm has the same S seeds and
            prompts; the number of DPO seeds may differ between arms.
        draws: B.
    """
    cells = {name: np.array([np.stack(runs) for runs in seeds]) for name, seeds in verdicts.items()}  # [S, R, P]
    seeds, _, prompts = next(iter(cells.values())).shape
    runs = max(cell.shape[1] for cell in cells.values())
    rng = np.random.default_rng(0)
    found = {name: np.empty(draws) for name in cells}
    for draw in range(draws):
        m0 = rng.integers(seeds, size=seeds)
        dpo = rng.integers(runs, size=(seeds, runs))
        prompt = rng.integers(prompts, size=(seeds, 1, prompts))
        for name, cell in cells.items():
            own = dpo[:, : cell.shape[1]] % cell.shape[1]
            found[name][draw] = np.nanmean(cell[m0[:, None, None], own[:, :, None], prompt])
    return {name: Estimate(value=float(np.nanmean(cell)), draws=found[name]) for name, cell in cells.items()}


def ranking_quality(
    scores: Mapping[str, Sequence[np.ndarray]], kinds: Sequence[np.ndarray], *, draws: int = 400
) -> dict[str, dict[str, Estimate]]:
    """ROC-AUC, precision at k, and ROC-AUC against over-refusal pairs, of every method.

    Args:
        scores: per method, S arrays [N], NaN without a score.
        kinds: S arrays [N] of labels.
        draws: B.
    """
    rng = np.random.default_rng(0)
    seeds = len(kinds)
    resampled: dict[str, dict[str, list[float]]] = {name: {} for name in scores}
    for _ in range(draws):
        chosen = rng.integers(seeds, size=seeds)
        rows = [rng.integers(len(kinds[seed]), size=len(kinds[seed])) for seed in chosen]
        for name, arrays in scores.items():
            for figure, value in _mean_figures(
                [ranking_figures(arrays[seed][row], kinds[seed][row]) for seed, row in zip(chosen, rows, strict=True)]
            ).items():
                resampled[name].setdefault(figure, []).append(value)
    return {
        name: {
            figure: Estimate(value=value, draws=np.array(resampled[name][figure]))
            for figure, value in _mean_figures(
                [ranking_figures(scored, labels) for scored, labels in zip(arrays, kinds, strict=True)]
            ).items()
        }
        for name, arrays in scores.items()
    }


def _mean_figures(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}
