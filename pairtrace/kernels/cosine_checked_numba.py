"""The CPU kernels behind `pairtrace.kernels.cosine_checked`: imported only when they run, because Numba is heavy.

Letters: n rows, D width, K directions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import prange

from pairtrace.kernels.checksum_numba import INVERTED, instruction_available, piece_state, power_of_bytes, times
from pairtrace.kernels.compiled import parallel, run
from pairtrace.kernels.cosine_inputs import HostRows
from pairtrace.kernels.cosine_numba import GROUP, NO_SIDE, Side, score_group

# Bytes of a task: a quarter of the smallest second cache that servers have.
_TASK_BYTES = 1 << 18


@parallel
def _one_direction(
    rows: Any, minus: Any, units: int, width: int, out: Any, data: Any, task_rows: int, task_bytes: int
) -> Any:
    tasks = out.shape[0] // task_rows
    states = np.zeros(tasks + 1, np.uint64)
    third_power = power_of_bytes(task_bytes // 24 * 8)
    rest = data.shape[0] - tasks * task_bytes
    rest_power = power_of_bytes(rest // 24 * 8)
    for task in prange(tasks + 1):
        if task < tasks:
            start = task * task_bytes
            states[task] = piece_state(data, start, start + task_bytes, np.uint64(0), third_power)
        else:
            states[task] = piece_state(data, tasks * task_bytes, data.shape[0], np.uint64(0), rest_power)
        for first in range(task * task_rows, min((task + 1) * task_rows, out.shape[0]), GROUP):
            score_group(rows, minus, units, (0,), width, 0, out, first, 0)
    return _joined(states, task_bytes, rest)


@parallel
def _many_directions(
    rows: Any, minus: Any, units: int, width: int, out: Any, data: Any, task_rows: int, task_bytes: int
) -> Any:
    tasks = out.shape[0] // task_rows
    states = np.zeros(tasks + 1, np.uint64)
    third_power = power_of_bytes(task_bytes // 24 * 8)
    rest = data.shape[0] - tasks * task_bytes
    rest_power = power_of_bytes(rest // 24 * 8)
    for task in prange(tasks + 1):
        if task < tasks:
            start = task * task_bytes
            states[task] = piece_state(data, start, start + task_bytes, np.uint64(0), third_power)
        else:
            states[task] = piece_state(data, tasks * task_bytes, data.shape[0], np.uint64(0), rest_power)
        for first in range(task * task_rows, min((task + 1) * task_rows, out.shape[0]), GROUP):
            for k in range(0, out.shape[1], GROUP):
                unit_starts = (k * width, (k + 1) * width, (k + 2) * width, (k + 3) * width)
                score_group(rows, minus, units, unit_starts, width, 0, out, first, k)
    return _joined(states, task_bytes, rest)


@numba.njit
def _joined(states: Any, task_bytes: int, rest: int) -> Any:
    """State after all bytes, from those of the tasks and of the rest."""
    state = np.uint64(INVERTED)
    power = power_of_bytes(task_bytes)
    for task in range(states.shape[0] - 1):
        state = times(power, state) ^ states[task]
    return times(power_of_bytes(rest), state) ^ states[states.shape[0] - 1]


def available() -> bool:
    """Whether this processor has the instruction."""
    return instruction_available()


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
