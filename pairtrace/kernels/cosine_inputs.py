"""What the cosine kernels accept, checked once and brought into the form they read.

Letters: N pairs (rows), D width, K directions.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError, DirectionError

if TYPE_CHECKING:
    import torch


def rows_are_dense(words: np.ndarray) -> bool:
    """Whether kernels can read the rows [N, D] in place: each contiguous and aligned, one after the other."""
    size = words.itemsize
    row, column = words.strides
    return (
        words.flags.aligned
        and (column == size or words.shape[1] == 1)
        and ((row >= size * words.shape[1] and row % size == 0) or len(words) == 1)
    )


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    torch_module = sys.modules.get("torch")
    return torch_module is not None and isinstance(value, torch_module.Tensor)


def host_words(rows: np.ndarray | torch.Tensor, row_dtype: str | None) -> np.ndarray:
    """Rows [N, D] as float32, float16 or int16 (bfloat16 bits) in host memory; no copy where they are there already."""
    if not isinstance(rows, np.ndarray):
        import torch

        host = rows.detach().cpu()
        words: np.ndarray = (host.view(torch.int16) if host.dtype == torch.bfloat16 else host).numpy()
        return words
    if row_dtype == "bfloat16":
        return np.asarray(rows).view(np.int16)
    return np.asarray(rows)


def check_rows(rows: np.ndarray | torch.Tensor, row_dtype: str | None) -> None:
    """Raise ConfigError unless the rows are [N, D] of a supported dtype that agrees with `row_dtype`."""
    if not isinstance(rows, np.ndarray) and not is_tensor(rows):
        raise ConfigError(f"rows must be a numpy array or a torch tensor, not {type(rows).__name__}")
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


def unit_directions(directions: np.ndarray | torch.Tensor, width: int) -> np.ndarray:
    """Directions divided by their norms, float64 [K, D]; DirectionError says which one is unusable and why."""
    if not isinstance(directions, np.ndarray) and is_tensor(directions):
        directions = directions.detach().cpu().double().numpy()
    values = np.atleast_2d(np.asarray(directions, dtype=np.float64))
    if values.ndim != 2:
        raise DirectionError(f"directions must have shape [D] or [K, D], not {values.shape}")
    if values.shape[0] == 0:
        raise DirectionError("expected at least one direction, got none")
    if values.shape[1] != width:
        raise DirectionError(f"the directions have width {values.shape[1]}, but the rows have width {width}")
    for k in np.flatnonzero(~np.isfinite(values).all(axis=1)):
        column = int(np.flatnonzero(~np.isfinite(values[k]))[0])
        raise DirectionError(f"direction {k} must be finite, but its value {column} is {values[k, column]}")
    largest = np.abs(values).max(axis=1, initial=0.0)
    for k in np.flatnonzero(largest == 0):
        raise DirectionError(f"direction {k} must have a norm above 0, but all its {width} values are 0")
    scaled: np.ndarray = values / largest[:, None]
    units: np.ndarray = scaled / np.sqrt(np.square(scaled).sum(axis=1, keepdims=True))
    return units


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
