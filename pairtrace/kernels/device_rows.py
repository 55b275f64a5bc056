"""Scaled int8 rows on a device, the tensor form of `pairtrace.kernels.int8.ScaledRows`.

Letters: N rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pairtrace.errors import ConfigError
from pairtrace.kernels.int8 import ScaledRows


@dataclass(frozen=True, eq=False)
class DeviceScaledRows:
    """Rows [N, D] as int8 with their scales, all on one device.

    Attributes:
        values: int8 [N, D], between -127 and 127; any strides.
        row_scale: float32 [N], contiguous.
        column_scale: float32 [D], contiguous.
    """

    values: torch.Tensor
    row_scale: torch.Tensor
    column_scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.ndim != 2:
            raise ConfigError(f"values must be int8 [N, D], not {self.values.dtype} {tuple(self.values.shape)}")
        count, width = self.values.shape
        for name, expected in (("row_scale", (count,)), ("column_scale", (width,))):
            scale = getattr(self, name)
            if scale.dtype != torch.float32 or tuple(scale.shape) != expected or not scale.is_contiguous():
                raise ConfigError(
                    f"{name} must be contiguous float32 {expected}, not {scale.dtype} {tuple(scale.shape)}"
                )
            if scale.device != self.values.device:
                raise ConfigError(f"{name} is on {scale.device}, but the values are on {self.values.device}")

    @classmethod
    def on(cls, rows: ScaledRows, device: torch.device | str) -> DeviceScaledRows:
        """Copy scaled rows to a device."""
        return cls(*(_tensor(part, device) for part in (rows.values, rows.row_scale, rows.column_scale)))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.values.device

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""
        count, width = self.values.shape
        return count, width

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    def __getitem__(self, rows: slice) -> DeviceScaledRows:
        """A range of the rows, as views."""
        return DeviceScaledRows(self.values[rows], self.row_scale[rows], self.column_scale)


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A tensor on `device`; read-only arrays (memory maps) are copied first, as torch asks."""
    contiguous = np.ascontiguousarray(array)
    return torch.from_numpy(contiguous if contiguous.flags.writeable else contiguous.copy()).to(device)
