"""What scores a store gives by chance: those of random directions.

Legend: N pairs, D width, R random behaviours of K directions each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pairtrace.engine.progress import Progress
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import DataFormatError
from pairtrace.kernels.cosine import RowDtype, cosine_blocks
from pairtrace.kernels.histogram import ScoreHistogram
from pairtrace.store.reader import ActivationStore

# Enough that the tail at one in a million of a data set of 10,000 pairs is seen; banks take as many as fit.
_DIRECTIONS = 512


def names_directions(table: ScoresTable, behavior: str) -> bool:
    """Whether a scores file says with which direction, at which layer, a behaviour was scored: `random_tail` asks."""
    return _described(table, behavior) is not None and isinstance(table.manifest.get("layer"), int)


def _described(table: ScoresTable, behavior: str) -> dict[str, Any] | None:
    """What the file says of the behaviour's direction."""
    entries = [entry for entry in table.manifest.get("directions") or () if isinstance(entry, dict)]
    return next((entry for entry in entries if entry.get("name") == behavior), None)


def random_tail(
    table: ScoresTable, behavior: str, store: str | None, seed: int, progress: Progress
) -> Callable[[np.ndarray], np.ndarray]:
    """How often a random behaviour of the same kind reaches a score on the same pairs.

    Directions are drawn uniformly from the sphere; a bank is matched by banks of random directions, whose maximum
    counts. The scores of all pairs with all of them go into a histogram.

    Args:
        table: the scores file, whose manifest names store, layer and kind.
        behavior: name of the behaviour.
        store: the activation store; None for the path that the scores recorded.
        seed: of the directions.
        progress: receives one stage, counted in pairs.

    Returns:
        A function from scores float [n] to shares float64 [n].

    Raises:
        DataFormatError: the scores file does not say how they were made.
        StoreError: the store cannot be read.
    """
    entry, layer = _described(table, behavior), table.manifest.get("layer")
    place = store or table.manifest.get("store")
    if entry is None or not isinstance(layer, int) or not isinstance(place, str):
        raise DataFormatError(
            f"{table.path} does not say from which store, layer and direction {behavior!r} was scored, which "
            "--null random needs; use --null sign-flip, -k or --fraction"
        )
    opened = ActivationStore.open(place, allow_incomplete=True)
    bank = int(entry["directions"]) if entry.get("kind") == "bank" else 1
    behaviors = max(1, _DIRECTIONS // bank)
    directions = np.random.default_rng(seed).standard_normal((behaviors * bank, opened.width)).astype(np.float32)
    row_dtype: RowDtype | None = "bfloat16" if opened.manifest.dtype == "bfloat16" else None
    histogram = ScoreHistogram()
    progress.start("random directions", opened.rows, "pairs")
    for _, rows in opened.blocks(layer):
        for _, scores in cosine_blocks(rows, directions, row_dtype=row_dtype):
            largest = scores.reshape(len(scores), behaviors, bank).max(axis=2)
            histogram.update(largest.reshape(-1))
        progress.advance(len(rows))
    progress.finish()
    total = int(histogram.counts.sum())
    if total == 0:
        raise DataFormatError(f"no pair of {place} has a cosine, so there is no null for --fdr")

    def tail(scores: np.ndarray) -> np.ndarray:
        # At least one in all: chance scores beyond the largest one seen are rare, not impossible.
        return np.maximum(1, [int(histogram.count_at_least(float(score))[0]) for score in scores]) / total

    return tail
