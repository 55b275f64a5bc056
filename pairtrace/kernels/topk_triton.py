"""The k best rows of each direction on a GPU, without N x K scores: they never leave the kernels' registers.

Letters: N pairs (rows), D width, K directions, C candidates that a direction may have per launch.

A launch compares each score with its direction's k-th best so far and appends the survivors as 64-bit keys: the score's
bits in an order of integers, then the row counted downwards, so that a larger key ranks first and equal scores rank by
the lower row. Between launches the keys are reduced to the k largest. Keys are unique, so the result does not depend on
the order in which programs append. A launch with more than C survivors of a direction is repeated in halves.
"""

from __future__ import annotations

import numpy as np
import torch

from pairtrace.errors import ConfigError
from pairtrace.kernels.cosine_triton import DeviceDirections, Rows, TopKTarget

LOWEST_KEY = -(2**63)
ROW_LIMIT = 2**32
# Candidates over all directions, 8 bytes each.
CANDIDATES = 1 << 25
FEWEST_CANDIDATES = 1024
# Expected survivors of a launch, as a share of C; the rest is room for an uneven order of the rows.
FILLING = 0.25


class DeviceTopK:
    """Keeps the k largest (or smallest) scores of each direction while blocks of rows pass by.

    Attributes:
        k: number of scores kept per direction.
        nan_count: rows without a score among those offered.
    """

    def __init__(
        self, directions: DeviceDirections, k: int, *, largest: bool = True, capacity: int | None = None
    ) -> None:
        """Prepare for `directions`.

        Args:
            directions: K unit directions on a device.
            k: scores kept per direction.
            largest: whether the largest scores are kept.
            capacity: C; None for as many as `CANDIDATES` allows, at least twice k.
        """
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        self.k = k
        self.nan_count = 0
        self._directions = directions
        self._largest = largest
        self._offered = 0
        room = max(FEWEST_CANDIDATES, 2 * k, min(CANDIDATES // directions.count, 64 * k))
        self.capacity = room if capacity is None else capacity
        shape = (directions.count, self.capacity)
        self._keys = torch.full(shape, LOWEST_KEY, dtype=torch.int64, device=directions.device)
        self._best = torch.empty((directions.count, 0), dtype=torch.int64, device=directions.device)
        self._thresholds = torch.full((directions.count,), LOWEST_KEY, dtype=torch.int64, device=directions.device)

    def update(
        self, rows: Rows, start_row: int, *, norms: torch.Tensor | None = None, minus: Rows | None = None
    ) -> None:
        """Score rows `start_row`, `start_row + 1`, ... and keep the best; each row may be offered once.

        Args:
            rows: [n, D] on the device of the directions, as for `planned_scores`.
            start_row: number of the first row.
            norms: float32 [n] on the device, used instead of the rows' own.
            minus: rejected side, as for `planned_scores`.

        Raises:
            ConfigError: a row number is 2^32 or more.
        """
        if start_row + len(rows) > ROW_LIMIT:
            raise ConfigError(f"rows are numbered below {ROW_LIMIT}, but row {start_row + len(rows) - 1} was offered")
        start, step = 0, self._next_step()
        while start < len(rows):
            stop = min(start + step, len(rows))
            part = slice(start, stop)
            if self._try(
                rows[part],
                start_row + start,
                None if norms is None else norms[part],
                None if minus is None else minus[part],
            ):
                self._offered += stop - start
                start, step = stop, self._next_step()
            else:
                step = (stop - start + 1) // 2

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The best so far, best first; ties by the lower row.

        Returns:
            scores float32 [K, m] and rows int64 [K, m], m the largest number kept for a direction; one with fewer ends
            in NaN and row -1.
        """
        keys = self._best.cpu().numpy()
        keys = keys[:, : int((keys != LOWEST_KEY).sum(axis=1).max())]
        order = (keys >> 32).astype(np.int32)
        ranked = np.where(order >= 0, order, order ^ 0x7FFFFFFF).astype(np.int32).view(np.float32)
        empty = keys == LOWEST_KEY
        scores = np.where(empty, np.float32(np.nan), ranked if self._largest else -ranked)
        return scores, np.where(empty, -1, 0xFFFFFFFF - (keys & 0xFFFFFFFF))

    def _next_step(self) -> int:
        """Rows of the next launch.

        After m rows in no particular order, n more are expected to bring k * n / m survivors. The first launch has no
        threshold yet: everything survives.
        """
        if self._offered < self.k:
            return self.capacity
        return max(self.capacity, int(FILLING * self.capacity * self._offered / self.k))

    def _try(self, rows: Rows, first_row: int, norms: torch.Tensor | None, minus: Rows | None) -> bool:
        """One launch; False, and nothing changed, where the candidates overflowed."""
        counts = torch.zeros(self._directions.count + 1, dtype=torch.int32, device=self._directions.device)
        target = TopKTarget(self._keys, self._thresholds, counts, first_row, self._largest)
        self._directions.score(rows, norms, minus, target)
        found = counts.cpu().numpy()
        most = int(found[:-1].max())
        if most > self.capacity:
            self._keys.fill_(LOWEST_KEY)
            return False
        self.nan_count += int(found[-1])
        candidates = torch.cat([self._best, self._keys[:, :most]], dim=1)
        kept = min(self.k, self._best.shape[1] + len(rows))
        if candidates.shape[1] < kept:
            missing = kept - candidates.shape[1]
            candidates = torch.nn.functional.pad(candidates, (0, missing), value=LOWEST_KEY)
        self._best = torch.topk(candidates, kept, dim=1, sorted=True).values
        if kept == self.k:
            self._thresholds = self._best[:, -1].contiguous()
        self._keys[:, :most] = LOWEST_KEY
        return True
