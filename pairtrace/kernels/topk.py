"""The k best of a stream of scores, in memory that does not grow with the stream.

Letters: n scores of a block, k kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Candidates gathered before they are reduced to k again.
_SLACK = 1 << 16


class StreamingTopK:
    """Keeps the k largest (or smallest) scores and their rows.

    The result equals the first k entries of a full sort by score, ties by the lower row, whatever the block sizes and
    the order of the blocks. NaN has no rank: it is left out and counted.

    Attributes:
        k: number of scores kept.
        largest: whether the largest scores are kept.
        seen: number of scores offered so far, NaN included.
        nan_count: number of NaN scores among them.
    """

    def __init__(self, k: int, largest: bool = True) -> None:
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        self.k = k
        self.largest = largest
        self.seen = 0
        self.nan_count = 0
        self._scores = [np.empty(0, np.float32)]
        self._rows = [np.empty(0, np.int64)]
        self._held = 0
        self._worst: np.float32 | None = None

    def update(self, scores: np.ndarray | torch.Tensor, start_row: int) -> None:
        """Offer the scores of rows `start_row`, `start_row + 1`, ...; each row may be offered once.

        Args:
            scores: float32 [n], numpy array or torch tensor.
            start_row: row number of `scores[0]`.

        Raises:
            ConfigError: `scores` is not float32 or not one-dimensional.
        """
        values = scores if isinstance(scores, np.ndarray) else scores.detach().cpu().numpy()
        if values.dtype != np.float32 or values.ndim != 1:
            raise ConfigError(f"scores must be float32 [n], not {values.dtype} {values.shape}")
        self.seen += len(values)
        ranked = ~np.isnan(values)
        self.nan_count += len(values) - int(np.count_nonzero(ranked))
        if self._worst is not None:  # an equal score may still win by its lower row
            ranked &= (values >= self._worst) if self.largest else (values <= self._worst)
        chosen = np.flatnonzero(ranked)
        if len(chosen) == 0:
            return
        self._scores.append(values[chosen])
        self._rows.append(chosen + start_row)
        self._held += len(chosen)
        if self._held >= self.k + _SLACK:
            self._reduce()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The best so far, best first.

        Returns:
            scores float32 [m] and rows int64 [m], m = min(k, scores offered that are not NaN).
        """
        self._reduce()
        return self._scores[0].copy(), self._rows[0].copy()

    def _reduce(self) -> None:
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        order = np.lexsort((rows, -scores if self.largest else scores))[: self.k]
        self._scores, self._rows = [scores[order]], [rows[order]]
        self._held = len(order)
        if self._held == self.k:
            self._worst = self._scores[0][-1]
