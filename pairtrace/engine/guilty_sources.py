"""Which sources fill the top of a ranking, found one after the other.

A source that is contaminated a little hides behind one that is contaminated a lot: against the whole top it seems
under-represented. So the most over-represented source is set aside, and the rest is looked at again, until little of
the top is left or no source stands out. And a pair just above the cut may well be innocent, so every selected pair
weighs by how far its score lies above the cut (its mass), not one each.

Legend: N rows, S sources, n selected rows.
"""

from __future__ import annotations

import numpy as np

from pairtrace.engine.intervals import wilson_interval


def score_mass(scores: np.ndarray, selected: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """How far each selected pair's score lies above the best score that was not selected.

    Args:
        scores: float32 [N].
        selected: int64 [n], rows, best first.
        ranked: bool [N], rows that have a rank; the selected are among them.

    Returns:
        float64 [N], 0 for rows that are not selected. Where all selected scores are the same, each weighs 1.
    """
    left = ranked.copy()
    left[selected] = False
    cut = float(scores[left].max()) if left.any() else float(scores[selected].min())
    mass = np.zeros(len(scores))
    mass[selected] = np.maximum(scores[selected].astype(np.float64) - cut, 0.0)
    if not mass.any():
        mass[selected] = 1.0
    return mass


def guilty_sources(
    place: np.ndarray, mass: np.ndarray, ranked: np.ndarray, *, min_lift: float, coverage: float, confidence: float
) -> list[int]:
    """Set the most over-represented sources aside, one after the other.

    A source's lift is its share of the mass over its share of the rows, both among the sources that are left. Its
    interval is Wilson's at the effective number of pairs, (sum w)^2 / sum w^2 (L. Kish, "Survey Sampling", 1965, for
    unequal weights), with Bonferroni's correction for the number of sources that are left.

    Args:
        place: int64 [N], the source of each row, 0 to S - 1.
        mass: float64 [N], as `score_mass` gives it.
        ranked: bool [N], rows that count.
        min_lift: a source goes when the low end of the interval of its lift is above this.
        coverage: enough when the sources that were set aside hold this share of all mass.
        confidence: of all intervals of a step together.

    Returns:
        Numbers of the sources, in the order in which they were set aside; empty where none stands out.
    """
    rows = np.bincount(place[ranked], minlength=int(place.max(initial=0)) + 1).astype(np.float64)
    weights = np.bincount(place, weights=mass, minlength=len(rows))
    squares = np.bincount(place, weights=mass**2, minlength=len(rows))
    left = rows > 0
    guilty: list[int] = []
    while weights[left].sum() > (1 - coverage) * weights.sum():
        total, count = weights[left].sum(), rows[left].sum()
        effective = total**2 / squares[left].sum()
        level = 1 - (1 - confidence) / int(left.sum())
        lifts = np.full(len(rows), -np.inf)
        for one in np.flatnonzero(left).tolist():
            low, _ = wilson_interval(weights[one] / total * effective, effective, level)
            lifts[one] = low / (rows[one] / count)
        worst = int(lifts.argmax())
        if lifts[worst] <= min_lift:
            break
        guilty.append(worst)
        left[worst] = False
    return guilty
