"""What the cosine kernels accept, checked once and brought into the form they read.

Letters: N pairs (rows), D width, K directions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError, DirectionError
from pairtrace.kernels.int8 import ScaledRows

if TYPE_CHECKING:
    import torch


# The CPU kernels take more than one direction in groups of this many.
DIRECTION_GROUP = 4


@dataclass(frozen=True, eq=False)
class HostRows:
    """Rows [N, D] in host memory.

    Attributes:
        words: float32, float16, int16 (bfloat16 bits) or int8 [N, D]; any strides.
        row_scale: float32 [N], only for int8.
        column_scale: float32 [D], only for int8.
    """

    words: np.ndarray
    row_scale: np.ndarray | None = None
    column_scale: np.ndarray | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.words)

    def __getitem__(self, rows: slice) -> HostRows:
        """Some of the rows; views."""
        row_scale = None if self.row_scale is None else self.row_scale[rows]
        return HostRows(self.words[rows], row_scale, self.column_scale)

    @property
    def dense(self) -> bool:
        """Whether kernels can read the rows in place: each contiguous and aligned, one after the other."""
        size = self.words.itemsize
        row, column = self.words.strides
        return (
            self.words.flags.aligned
            and (column == size or self.words.shape[1] == 1)
            and ((row >= size * self.words.shape[1] and row % size == 0) or len(self) == 1)
        )

    def exact(self) -> np.ndarray:
        """The values, float64 [N, D]."""
        words = self.words
        if words.dtype == np.int16:
            words = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        values: np.ndarray = words.astype(np.float64)
        if self.row_scale is not None and self.column_scale is not None:
            values *= self.row_scale.astype(np.float64)[:, None]
            values *= self.column_scale.astype(np.float64)
        return values


@dataclass(frozen=True, eq=False)
class UnitDirections:
    """Directions divided by their norms, in the forms that kernels read, each made at its first use.

    Attributes:
        exact: float64 [K, D].
    """

    exact: np.ndarray

    def __len__(self) -> int:
        """K."""
        return len(self.exact)

    @cached_property
    def padded(self) -> np.ndarray:
        """Float32, flat; more than one direction rounded up to a multiple of `DIRECTION_GROUP` with zeros."""
        count, width = self.exact.shape
        padded = np.zeros((1 if count == 1 else -(-count // DIRECTION_GROUP) * DIRECTION_GROUP, width), np.float32)
        padded[:count] = self.exact
        return padded.reshape(-1)

    @cached_property
    def columns(self) -> np.ndarray:
        """Float32 [D, K], contiguous: the right side of a matrix product."""
        return np.ascontiguousarray(self.exact.T, dtype=np.float32)


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(value, torch_module.Tensor)


def host_rows(rows: np.ndarray | torch.Tensor | ScaledRows, row_dtype: str | None) -> HostRows:
    """Rows [N, D] in host memory; no copy where they are there already."""
    if isinstance(rows, ScaledRows):
        return HostRows(rows.values, rows.row_scale, rows.column_scale)
    if not isinstance(rows, np.ndarray):
        import torch

        host = rows.detach().cpu()
        return HostRows((host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy())
    return HostRows(np.asarray(rows).view(np.int16) if row_dtype == "bfloat16" else np.asarray(rows))


def check_rows(rows: np.ndarray | torch.Tensor | ScaledRows, row_dtype: str | None) -> None:
    """Raise ConfigError unless the rows are [N, D] of a supported dtype that agrees with `row_dtype`."""
    if isinstance(rows, ScaledRows):
        if row_dtype is not None:
            raise ConfigError(f"row_dtype describes arrays of words, but the rows are scaled int8; omit {row_dtype!r}")
        return
    if not isinstance(rows, np.ndarray) and not is_tensor(rows):
        raise ConfigError(f"rows must be a numpy array, a torch tensor or ScaledRows, not {type(rows).__name__}")
    if rows.ndim != 2:
        raise ConfigError(f"rows must have two dimensions [N, D], not shape {tuple(rows.shape)}")
    if isinstance(rows, np.ndarray):
        actual = rows.dtype.name if rows.dtype.isnative else rows.dtype.str
        allowed = {None: ("float32", "float16"), "bfloat16": ("uint16",)}.get(row_dtype, (row_dtype,))
    else:
        actual = str(rows.dtype).removeprefix("torch.")
        allowed = ("float32", "float16", "bfloat16") if row_dtype is None else (row_dtype,)
    if actual not in allowed:
        hint = "; pass row_dtype='bfloat16' if these are bfloat16 bits" if actual == "uint16" else ""
        raise ConfigError(f"rows must be {' or '.join(str(a) for a in allowed)}, not {actual}{hint}")


def check_minus(
    minus: np.ndarray | torch.Tensor | ScaledRows, rows: np.ndarray | torch.Tensor | ScaledRows, row_dtype: str | None
) -> None:
    """Raise ConfigError unless `minus` has the kind, shape and dtype of `rows`, on the same device."""
    check_rows(minus, row_dtype)

    def described(side: np.ndarray | torch.Tensor | ScaledRows) -> str:
        if isinstance(side, ScaledRows):
            return f"scaled int8 {tuple(side.shape)}"
        kind = "array" if isinstance(side, np.ndarray) else f"tensor on {side.device}"
        return f"{kind} {str(side.dtype).removeprefix('torch.')} {tuple(side.shape)}"

    if described(minus) != described(rows):
        raise ConfigError(f"minus must be like rows, {described(rows)}, but is {described(minus)}")


def prepare_directions(directions: np.ndarray | torch.Tensor) -> UnitDirections:
    """Directions [D] or [K, D] checked and divided by their norms, for scoring many blocks of rows with them.

    Raises:
        DirectionError: a direction is zero or holds a value that is not finite, or there is none.
    """
    if not isinstance(directions, np.ndarray) and is_tensor(directions):
        directions = directions.detach().cpu().double().numpy()
    values = np.atleast_2d(np.asarray(directions, dtype=np.float64))
    if values.ndim != 2:
        raise DirectionError(f"directions must have shape [D] or [K, D], not {values.shape}")
    if values.shape[0] == 0:
        raise DirectionError("expected at least one direction, got none")
    largest = np.maximum(values.max(axis=1, initial=0.0), -values.min(axis=1, initial=0.0))
    for k in np.flatnonzero(~np.isfinite(largest)):
        column = int(np.flatnonzero(~np.isfinite(values[k]))[0])
        raise DirectionError(f"direction {k} must be finite, but its value {column} is {values[k, column]}")
    for k in np.flatnonzero(largest == 0):
        raise DirectionError(f"direction {k} must have a norm above 0, but all its {values.shape[1]} values are 0")
    units: np.ndarray = values / largest[:, None]
    units /= np.sqrt(np.einsum("kd,kd->k", units, units))[:, None]
    return UnitDirections(units)


def unit_directions(directions: np.ndarray | torch.Tensor | UnitDirections, width: int) -> np.ndarray:
    """Directions divided by their norms, float64 [K, D]; DirectionError says which one is unusable and why."""
    return prepared_directions(directions, width).exact


def prepared_directions(directions: np.ndarray | torch.Tensor | UnitDirections, width: int) -> UnitDirections:
    """`prepare_directions` where that is still to be done; DirectionError where the width D is not that of the rows."""
    if isinstance(directions, UnitDirections):
        actual = directions.exact.shape[1]
    else:
        actual = np.shape(directions)[-1] if len(np.shape(directions)) in (1, 2) else width
    if actual != width and len(directions):
        raise DirectionError(f"the directions have width {actual}, but the rows have width {width}")
    return directions if isinstance(directions, UnitDirections) else prepare_directions(directions)


def check_norms(norms: np.ndarray | torch.Tensor | None, count: int) -> np.ndarray | None:
    """Given norms as a host array float32 [N]; ConfigError for another shape."""
    if norms is None:
        return None
    if not isinstance(norms, np.ndarray) and is_tensor(norms):
        norms = norms.detach().cpu().numpy()
    values = np.asarray(norms, dtype=np.float32)
    if values.shape != (count,):
        raise ConfigError(f"norms must have shape ({count},), one per row, not {values.shape}")
    return values
