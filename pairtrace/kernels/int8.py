"""Rows as scaled int8: `values * row_scale[:, None] * column_scale`, a quarter of float32 and half of float16.

Letters: N rows, D width.

One scale per column keeps outlier dimensions of the residual stream from crushing the rest, one per row keeps rows of
small norm as precise as the others. A row's own scale cancels in its cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairtrace.errors import ConfigError

# Symmetric: -128 is never used.
LARGEST = 127


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows [N, D] as int8 with their scales.

    Attributes:
        values: int8 [N, D], between -127 and 127.
        row_scale: float32 [N]; 0 for a row of zeros.
        column_scale: float32 [D], above 0.
    """

    values: np.ndarray
    row_scale: np.ndarray
    column_scale: np.ndarray

    def __post_init__(self) -> None:
        count, width = self.values.shape
        if self.values.dtype != np.int8 or self.values.ndim != 2:
            raise ConfigError(f"values must be int8 [N, D], not {self.values.dtype} {self.values.shape}")
        for name, expected in (("row_scale", (count,)), ("column_scale", (width,))):
            scale = getattr(self, name)
            if scale.dtype != np.float32 or scale.shape != expected:
                raise ConfigError(f"{name} must be float32 {expected}, not {scale.dtype} {scale.shape}")

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        count, width = self.values.shape
        return count, width

    def __getitem__(self, rows: slice | np.ndarray) -> ScaledRows:
        """Some of the rows; a slice makes views."""
        return ScaledRows(self.values[rows], self.row_scale[rows], self.column_scale)

    def decode(self) -> np.ndarray:
        """The rows, float32 [N, D]."""
        decoded: np.ndarray = self.values * self.row_scale[:, None]
        decoded *= self.column_scale
        return decoded


def encode_int8(rows: np.ndarray) -> ScaledRows:
    """Round rows to scaled int8, to nearest even.

    The scale of a column is its root mean square over the rows, each divided by its norm first, so that every row has
    the same say. The scale of a row maps its largest value, in units of the columns' scales, to 127.

    Args:
        rows: [N, D] of a floating dtype; all finite.

    Raises:
        ConfigError: a value is not finite.
    """
    wide = np.asarray(rows, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(wide).all(axis=1))
    if broken.size:
        raise ConfigError(f"row {broken[0]} must be finite to be stored as int8, but holds NaN or infinity")
    norms = np.sqrt(np.square(wide).sum(axis=1))
    filled = norms > 0
    directions = wide[filled] / norms[filled, None]
    columns = np.sqrt(np.square(directions).mean(axis=0)) if filled.any() else np.zeros(wide.shape[1])
    column_scale = np.where(columns > 0, columns, 1.0).astype(np.float32)
    relative = wide / column_scale.astype(np.float64)
    row_scale = (np.abs(relative).max(axis=1, initial=0.0) / LARGEST).astype(np.float32)
    steps = np.divide(
        relative, row_scale.astype(np.float64)[:, None], out=np.zeros_like(relative), where=row_scale[:, None] > 0
    )
    values = np.clip(np.rint(steps), -LARGEST, LARGEST).astype(np.int8)
    return ScaledRows(values, row_scale, column_scale)
