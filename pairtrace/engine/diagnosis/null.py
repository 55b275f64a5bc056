"""What scores look like by chance: random directions that are drawn like the behaviour, or like the data.

Legend: K directions of the behaviour, D width, m sampled rows, R random behaviours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pairtrace.engine.diagnosis.sweep import Group
from pairtrace.store.layout import to_float32
from pairtrace.store.reader import ActivationStore

# Rows whose random sums are the directions drawn like the data.
_SAMPLED = 4096
# Directions of all random behaviours together, at most.
_MOST_DIRECTIONS = 1024


def sample_units(store: ActivationStore, layer: int, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some rows of the store divided by their norms, float32 [m, D]; rows without a norm are left out."""
    chosen = np.sort(rng.choice(rows, min(len(rows), _SAMPLED), replace=False))
    values = to_float32(store.take(layer, chosen))
    norms = np.linalg.norm(values, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    units: np.ndarray = values[usable] / norms[usable, None]
    return units


def data_like(behavior: np.ndarray, units: np.ndarray, behaviors: int, rng: np.random.Generator) -> Group:
    """Random behaviours whose directions have the covariance of the rows, and the inner geometry of the behaviour.

    With the singular value decomposition B = U S V' of the behaviour's K unit directions, U S Z has (in expectation)
    their Gram matrix for any rows Z of equal covariance; here these are random sums of the data's unit rows. One
    direction becomes one such sum.

    Args:
        behavior: float32 [K, D].
        units: float32 [m, D], rows of the data divided by their norms.
        behaviors: R, fewer where K is large.
        rng: of the sums.
    """
    return _like(behavior, lambda rank: rng.standard_normal((rank, len(units))).astype(np.float32) @ units, behaviors)


def sphere_like(behavior: np.ndarray, behaviors: int, rng: np.random.Generator) -> Group:
    """As `data_like`, with directions drawn uniformly from the sphere."""
    width = behavior.shape[1]
    return _like(behavior, lambda rank: rng.standard_normal((rank, width)).astype(np.float32), behaviors)


def _like(behavior: np.ndarray, draw: Callable[[int], np.ndarray], behaviors: int) -> Group:
    units = behavior / np.linalg.norm(behavior, axis=1, keepdims=True)
    left, singular, _ = np.linalg.svd(units.astype(np.float64), full_matrices=False)
    kept = singular > 1e-6 * singular[0]
    mixing = (left[:, kept] * singular[kept]).astype(np.float32)
    count = max(16, min(behaviors, _MOST_DIRECTIONS // len(behavior)))
    return Group.of_banks(np.stack([mixing @ draw(mixing.shape[1]) for _ in range(count)]), counted=True)
