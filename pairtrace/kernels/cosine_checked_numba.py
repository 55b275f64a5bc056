"""The CPU kernels behind `pairtrace.kernels.cosine_checked`: imported only when they run, because Numba is heavy.

Letters: n rows, D width, K directions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import prange

from pairtrace.kernels.checksum_numba import INVERTED, joined_states, piece_state, power_of_bytes
from pairtrace.kernels.compiled import parallel, run
from pairtrace.kernels.cosine_inputs import HostRows
from pairtrace.kernels.cosine_numba import GROUP, NO_SIDE, Side, score_group, score_group_in_turns

# Bytes of a task: a quarter of the smallest second cache that servers have.
_TASK_BYTES = 1 << 18


@numba.njit
def _take_checksum(data: Any, task: int, task_bytes: int, states: Any) -> None:
    """The state of a task's bytes alone; the last task has the rest."""
    start = task * task_bytes
    stop = start + task_bytes if task < states.shape[0] - 1 else data.shape[0]
    states[task] = piece_state(data, start, stop, np.uint64(0), power_of_bytes((stop - start) // 24 * 8))


@numba.njit
def _joined(data: Any, states: Any, task_bytes: int) -> Any:
    """State after all bytes, from those of the tasks."""
    tasks = states.shape[0] - 1
    state = joined_states(np.uint64(INVERTED), states[:tasks], task_bytes)
    return joined_states(state, states[tasks:], data.shape[0] - tasks * task_bytes)


@parallel
def _one_direction(
    rows: Any, minus: Any, units: int, width: int, out: Any, data: Any, task_rows: int, task_bytes: int
) -> Any:
    tasks = out.shape[0] // task_rows
    states = np.zeros(tasks + 1, np.uint64)
    for task in prange(tasks + 1):
        _take_checksum(data, task, task_bytes, states)
        for first in range(task * task_rows, min((task + 1) * task_rows, out.shape[0]), GROUP):
            score_group(rows, minus, units, (0,), width, 0, out, first, 0)
    return _joined(data, states, task_bytes)


@parallel
def _many_directions(
    rows: Any, minus: Any, units: int, width: int, out: Any, data: Any, task_rows: int, task_bytes: int
) -> Any:
    tasks = out.shape[0] // task_rows
    states = np.zeros(tasks + 1, np.uint64)
    for task in prange(tasks + 1):
        _take_checksum(data, task, task_bytes, states)
        for first in range(task * task_rows, min((task + 1) * task_rows, out.shape[0]), GROUP):
            score_group_in_turns(rows, minus, units, width, 0, out, first)
    return _joined(data, states, task_bytes)


def scores_and_checksum(rows: HostRows, units: np.ndarray, count: int, body: np.ndarray) -> tuple[np.ndarray, int]:
    """Scores float32 [n, K] and checksum.

    Args:
        rows: n rows, contiguous, at the beginning of `body`.
        units: `UnitDirections.padded`.
        count: K.
        body: uint8 [bytes].
    """
    side = Side.of(rows)
    n, width = rows.words.shape
    row_bytes = width * rows.words.itemsize
    task_rows = max(GROUP, _TASK_BYTES // row_bytes // GROUP * GROUP)
    out = np.empty((n, count), np.float32)
    data = body.view(np.ndarray).view()
    data.flags.writeable = False
    kernel = _one_direction if count == 1 else _many_directions
    state = run(
        kernel,
        *(side.arguments(), NO_SIDE.arguments(), units.ctypes.data, width, out),
        *(data, task_rows, task_rows * row_bytes),
    )
    return out, int(state) ^ INVERTED
