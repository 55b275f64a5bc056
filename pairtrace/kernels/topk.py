"""The k best of a stream of scores, for many directions at once, in memory that does not grow with the stream.

Letters: n rows of a block, K directions, k scores kept, m scores returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError
from pairtrace.kernels.score_inputs import score_block

if TYPE_CHECKING:
    import torch

# Room for entries per direction at the start; it doubles up to k as scores come.
_FIRST_CAPACITY = 64


class StreamingTopK:
    """Keeps the k largest (or smallest) scores of every direction and their rows.

    The result equals the first k entries of a full sort by score, ties by the lower row, whatever the block sizes and
    the order of the blocks. NaN has no rank: it is left out and counted. Once k scores are held, a score that is no
    candidate costs one comparison.

    Attributes:
        k: number of scores kept per direction.
        directions: K.
        largest: whether the largest scores are kept.
        seen: number of rows offered so far.
        nan_count: int64 [K], number of NaN scores among them.
    """

    def __init__(self, k: int, directions: int = 1, largest: bool = True) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        if directions < 1:
            raise ConfigError(f"directions must be at least 1, not {directions}")
        self.k = k
        self.directions = directions
        self.largest = largest
        self.seen = 0
        self.nan_count = np.zeros(directions, np.int64)
        # Heaps, as `topk_numba` describes them.
        self._keys = np.empty((directions, min(k, _FIRST_CAPACITY)), np.float32)
        self._rows = np.empty(self._keys.shape, np.int64)
        self._held = np.zeros(directions, np.int64)
        self._thresholds = np.full(directions, -np.inf, np.float32)

    @property
    def _sign(self) -> np.float32:
        return np.float32(1 if self.largest else -1)

    def update(self, scores: np.ndarray | torch.Tensor, start_row: int) -> None:
        """Offer the scores of rows `start_row`, `start_row + 1`, ...; each row may be offered once.

        Args:
            scores: float32 [n, K], or [n] for one direction; numpy array or torch tensor, not kept.
            start_row: row number of `scores[0]`.

        Raises:
            ConfigError: `scores` has another dtype or shape.
        """
        from pairtrace.kernels import topk_numba

        block = score_block(scores, self.directions)
        self._reserve(int(self._held.max()) + len(block))
        topk_numba.update(
            block,
            start_row,
            self._sign,
            self.k,
            self._keys,
            self._rows,
            self._held,
            self._thresholds,
            self.nan_count,
        )
        self.seen += len(block)

    def merge(self, other: StreamingTopK) -> None:
        """Take in what another stream has kept of other rows of the same directions.

        Raises:
            ConfigError: the other stream keeps something else.
        """
        from pairtrace.kernels import topk_numba

        for name in ("k", "directions", "largest"):
            if getattr(self, name) != getattr(other, name):
                raise ConfigError(
                    f"streams of the best scores differ in {name}: {getattr(self, name)} and {getattr(other, name)}"
                )
        self._reserve(int((self._held + other._held).max()))
        topk_numba.merge(
            self.k,
            self._keys,
            self._rows,
            self._held,
            self._thresholds,
            other._keys,
            other._rows,
            other._held,
        )
        self.seen += other.seen
        self.nan_count += other.nan_count

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The best so far, best first.

        Returns:
            scores float32 [K, m] and rows int64 [K, m]; m is the largest number held for a direction: min(k, rows
            seen) where no score is NaN. A direction with fewer ends in NaN and row -1.
        """
        longest = int(self._held.max())
        scores = np.full((self.directions, longest), np.nan, np.float32)
        rows = np.full((self.directions, longest), -1, np.int64)
        for direction, held in enumerate(self._held.tolist()):
            order = np.lexsort((self._rows[direction, :held], -self._keys[direction, :held]))
            scores[direction, :held] = self._keys[direction, order] * self._sign
            rows[direction, :held] = self._rows[direction, order]
        return scores, rows

    def _reserve(self, entries: int) -> None:
        needed = min(self.k, entries)
        if needed <= self._keys.shape[1]:
            return
        capacity = min(self.k, max(needed, 2 * self._keys.shape[1]))
        longest = int(self._held.max())
        for name in ("_keys", "_rows"):
            held = getattr(self, name)[:, :longest]
            larger = np.empty((self.directions, capacity), held.dtype)
            larger[:, :longest] = held
            setattr(self, name, larger)
