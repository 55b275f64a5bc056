"""What the streams over scores (`topk`, `histogram`) take.

Letters: n scores of a block, K directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    import torch


def score_block(scores: np.ndarray | torch.Tensor, directions: int) -> np.ndarray:
    """A block of scores as the kernels read it: float32 [n, K], contiguous, read-only; copied only where it must be.

    Args:
        scores: float32 [n, K], or [n] for one direction; a numpy array or a torch tensor on any device.
        directions: K.

    Raises:
        ConfigError: another dtype or shape.
    """
    values = scores if isinstance(scores, np.ndarray) else scores.detach().cpu().numpy()
    if values.ndim == 1 and directions == 1:
        values = values[:, None]
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != directions:
        expected = "[n] or [n, 1]" if directions == 1 else f"[n, {directions}]"
        raise ConfigError(f"scores must be float32 {expected}, not {scores.dtype} {tuple(scores.shape)}")
    # Writable and read-only arrays are types of their own to Numba: a read-only view compiles once.
    block = np.ascontiguousarray(values).view(np.ndarray)
    block.flags.writeable = False
    return block
