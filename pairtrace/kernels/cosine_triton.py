"""The GPU side of `pairtrace.kernels.cosine`: imported only when it runs, because Triton is optional.

Letters: N pairs (rows), D width, K directions.

Up to `STREAM_DIRECTIONS` directions the rows are read once and summed on the ordinary units; more go through the tensor
cores (`pairtrace.kernels.cosine_triton_kernels` says how both work). Float16 and int8 rows with up to
`FUSED_DIRECTIONS` directions are read once there too; all others are read once for their norms and once per block of
directions, which share them in the L2 cache.

Accuracy, in units of the score: both kernels sum float32 values in float32. The tensor cores' parts add at most 2^-22
for float16, bfloat16 and int8 rows and 3 * 2^-22 for float32 rows and differences (Cauchy-Schwarz, any D). Block sizes
come from a fixed table: equal shapes give equal bits; another number of directions may change the last bits.

The kernels run on CPU tensors when TRITON_INTERPRET=1 was set before this module was imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
import triton

from pairtrace.errors import ConfigError
from pairtrace.kernels.cosine_triton_kernels import matrix_kernel, stream_kernel
from pairtrace.kernels.device_rows import DeviceScaledRows

Rows: TypeAlias = "torch.Tensor | DeviceScaledRows"

STREAM_DIRECTIONS = 4
FUSED_DIRECTIONS = 128
# The largest value of a direction's parts becomes at most 2^HEADROOM: below float16's limit, far above its denormals.
HEADROOM = 14
# Columns of the parts are padded to this, so that no block of them needs a mask.
PART_COLUMNS = 128
PART_DIRECTIONS = 128
# Shared memory of a program, in bytes, that two stages of the widest blocks need.
WIDE_BLOCKS_BYTES = 200 << 10


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of a launch: rows, directions and columns of a program's block, loads under way, warps."""

    rows: int
    directions: int
    columns: int
    stages: int
    warps: int


@dataclass(frozen=True, eq=False)
class TopKTarget:
    """Where a launch appends candidates instead of storing scores; see `pairtrace.kernels.topk_triton`.

    Attributes:
        keys: int64 [K, C].
        thresholds: int64 [K], the keys that a candidate must exceed.
        counts: int32 [K + 1].
        first_row: number that the first row of the launch has among the rows ranked.
        largest: whether large scores rank first.
    """

    keys: torch.Tensor
    thresholds: torch.Tensor
    counts: torch.Tensor
    first_row: int
    largest: bool


def check_device(rows: Rows) -> None:
    """Refuse rows that Triton cannot reach.

    Raises:
        ConfigError: `rows` is neither on a CUDA device nor on the CPU under the interpreter.
    """
    interpreted = not isinstance(stream_kernel, triton.JITFunction)
    if rows.device.type == "cuda" or (interpreted and rows.device.type == "cpu"):
        return
    raise ConfigError(
        f"impl='triton' needs a CUDA tensor, but the rows are on {rows.device}; "
        "use impl='auto', or set TRITON_INTERPRET=1 to check the kernel on the CPU"
    )


def stream_blocks(width: int) -> Blocks:
    """Blocks of `stream_kernel`: 16 KB of float16 at a time, two to be read while one is summed."""
    columns = min(512, max(16, triton.next_power_of_2(width)))
    return Blocks(rows=16 if columns == 512 else 8, directions=1, columns=columns, stages=3, warps=4)


def matrix_blocks(directions: int, *, wide: bool, shared_bytes: int) -> Blocks:
    """Blocks of `matrix_kernel`.

    Args:
        directions: K.
        wide: whether rows enter as float32 (float32, bfloat16, differences), which takes twice the memory.
        shared_bytes: shared memory that a program may have.
    """
    block = min(PART_DIRECTIONS, max(16, triton.next_power_of_2(directions)))
    if block <= 32:  # memory is the limit: many loads under way, several programs at a time
        return Blocks(rows=64, directions=block, columns=64 if wide else 128, stages=3, warps=4)
    large = shared_bytes >= WIDE_BLOCKS_BYTES
    columns = 128 if large and not wide else 64 if large or not wide else 32
    return Blocks(rows=128, directions=block, columns=columns, stages=2, warps=8)


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return WIDE_BLOCKS_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


class DeviceDirections:
    """Unit directions on a device, in the forms that the kernels read; made once, used for any number of blocks.

    Attributes:
        count: K.
        width: D.
    """

    def __init__(self, units: np.ndarray, device: torch.device) -> None:
        self.count, self.width = units.shape
        self.device = device
        self._exact = torch.from_numpy(np.ascontiguousarray(units, dtype=np.float64)).to(device)
        self.float32 = self._exact.float()
        self._parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._folded: torch.Tensor | None = None

    def parts(self, column_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """High and low float16 parts [K, D], padded with zeros, and the factors [K] that undo their powers of two.

        Args:
            column_scale: float32 [D] that int8 rows leave to the directions; the parts of the last one are kept.
        """
        if self._parts is None or self._folded is not column_scale:
            exact = self._exact if column_scale is None else self._exact * column_scale.double()
            exponents = HEADROOM - torch.frexp(exact.abs().amax(dim=1)).exponent
            scaled = exact * _power_of_two(exponents)[:, None].double()
            shape = (_padded(self.count, PART_DIRECTIONS), _padded(self.width, PART_COLUMNS))
            high = torch.zeros(shape, dtype=torch.float16, device=self.device)
            low = torch.zeros_like(high)
            factors = torch.zeros(shape[0], dtype=torch.float32, device=self.device)
            own = high[: self.count, : self.width]
            own.copy_(scaled)
            low[: self.count, : self.width] = scaled - own.double()
            factors[: self.count] = _power_of_two(-exponents)
            self._parts, self._folded = (high, low, factors), column_scale
        return self._parts

    def score(
        self, rows: Rows, norms: torch.Tensor | None = None, minus: Rows | None = None, target: TopKTarget | None = None
    ) -> torch.Tensor | None:
        """Scores of rows [N, D], or of `rows - minus`: float32 [N, K]; None where they went into `target`."""
        launch = _Launch(rows, minus, norms, target)
        out = torch.empty((len(rows), self.count), device=self.device) if target is None else target.keys
        if len(rows):
            with _on(self.device):
                if self.count <= STREAM_DIRECTIONS:
                    launch.stream(self.float32, self.count, out, None)
                else:
                    self._matrix(launch, out)
        return out if target is None else None

    def _matrix(self, launch: _Launch, out: torch.Tensor) -> None:
        high, low, factors = self.parts(launch.columns if launch.exact else None)
        fused = launch.exact and self.count <= FUSED_DIRECTIONS
        lengths = roots = launch.unused
        if not fused:
            lengths, roots = (torch.empty(launch.count, device=self.device) for _ in range(2))
            launch.stream(self.float32, 0, lengths, roots)
        blocks = matrix_blocks(self.count, wide=not launch.exact, shared_bytes=_shared_bytes(self.device))
        grid = (triton.cdiv(launch.count, blocks.rows) * triton.cdiv(self.count, blocks.directions),)
        matrix_kernel[grid](
            **launch.arguments(out),
            high_ptr=high,
            low_ptr=low,
            factors_ptr=factors,
            lengths_ptr=lengths,
            roots_ptr=roots,
            K=self.count,
            padded_step=high.shape[1] // 16,
            FUSED=fused,
            EVEN_D=self.width % blocks.columns == 0,
            BLOCK_N=blocks.rows,
            BLOCK_K=blocks.directions,
            BLOCK_D=blocks.columns,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
            enable_fp_fusion=True,
        )


class _Launch:
    """One block of rows as the kernels take it."""

    def __init__(self, rows: Rows, minus: Rows | None, norms: torch.Tensor | None, target: TopKTarget | None) -> None:
        scaled = isinstance(rows, DeviceScaledRows)
        if minus is not None and isinstance(minus, DeviceScaledRows) != scaled:
            raise ConfigError("rows and minus must be of one kind, but only one of them is scaled int8")
        self._words, self._row_scale, self.columns = _taken_apart(rows)
        self._others, self._minus_scale, other_columns = (
            (self._words, self._row_scale, self.columns) if minus is None else _taken_apart(minus)
        )
        if self._others.shape != self._words.shape or self._others.dtype != self._words.dtype:
            raise ConfigError(
                f"rows and minus must agree, but are {self._words.dtype} {tuple(self._words.shape)} and "
                f"{self._others.dtype} {tuple(self._others.shape)}"
            )
        self.count, self.width = self._words.shape
        self.exact = minus is None and self._words.dtype in (torch.float16, torch.int8)
        if scaled and minus is not None and other_columns is not self.columns:
            assert self.columns is not None and other_columns is not None
            if not torch.equal(self.columns, other_columns):
                # Columns of two scales: their difference has no common one, so both sides are decoded.
                self._words, self._others = _decoded(rows), _decoded(minus)
                scaled, self.columns = False, None
        self._flags = {
            "HAS_NORMS": norms is not None,
            "HAS_MINUS": minus is not None,
            "SCALED": scaled,
            "TOPK": target is not None,
            "SIGN": 1.0 if target is None or target.largest else -1.0,
            "CAPACITY": 1 if target is None else target.keys.shape[1],
        }
        # Any address does where a flag says that a kernel does not read there.
        self.unused = torch.empty(1, device=self._words.device)
        self._norms = norms
        self._target = target

    def arguments(self, out: torch.Tensor) -> dict[str, Any]:
        """What both kernels take."""
        rows, others, target = self._words, self._others, self._target
        align = math.gcd(rows.stride(0), others.stride(0), 16) or 16
        return {
            "rows_ptr": rows,
            "minus_ptr": others,
            "columns_ptr": self.unused if self.columns is None else self.columns,
            "row_scale_ptr": self.unused if self._row_scale is None else self._row_scale,
            "minus_scale_ptr": self.unused if self._minus_scale is None else self._minus_scale,
            "norms_ptr": self.unused if self._norms is None else self._norms,
            "out_ptr": out,
            "thresholds_ptr": self.unused if target is None else target.thresholds,
            "counts_ptr": self.unused if target is None else target.counts,
            "N": self.count,
            "D": self.width,
            "row_step": rows.stride(0) // align,
            "column_stride": rows.stride(1),
            "minus_step": others.stride(0) // align,
            "minus_column_stride": others.stride(1),
            "first_row": 0 if target is None else target.first_row,
            "ALIGN": align,
            **self._flags,
        }

    def stream(self, units: torch.Tensor, count: int, out: torch.Tensor, roots: torch.Tensor | None) -> None:
        """Scores with `count` directions, or the rows' lengths and powers of two where it is 0."""
        blocks = stream_blocks(self.width)
        arguments = self.arguments(out)
        if count == 0:
            arguments |= {"TOPK": False, "SIGN": 1.0, "CAPACITY": 1}
        stream_kernel[(triton.cdiv(self.count, blocks.rows),)](
            **arguments,
            units_ptr=units,
            roots_ptr=self.unused if roots is None else roots,
            K=count,
            EVEN_D=self.width % blocks.columns == 0,
            BLOCK_N=blocks.rows,
            BLOCK_D=blocks.columns,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
            enable_fp_fusion=True,
        )


def planned_scores(
    rows: Rows, units: np.ndarray, norms: np.ndarray | None, minus: Rows | None = None
) -> Callable[[int, int], torch.Tensor]:
    """Prepare scoring on the device of `rows`.

    Args:
        rows: float32, float16 or bfloat16 [N, D] of any strides, or `DeviceScaledRows`.
        units: [K, D] unit directions.
        norms: float32 [N] norms to use instead of the rows' own.
        minus: rejected side of the same kind and shape; scores are those of `rows - minus`, which is never stored.

    Returns:
        Function that scores rows [start, stop): float32 [stop - start, K] on the device of `rows`.
    """
    directions = DeviceDirections(units, rows.device)
    lengths = None if norms is None else torch.from_numpy(np.array(norms, dtype=np.float32)).to(rows.device)

    def score(start: int, stop: int) -> torch.Tensor:
        scores = directions.score(
            rows[start:stop],
            None if lengths is None else lengths[start:stop],
            None if minus is None else minus[start:stop],
        )
        assert scores is not None
        return scores

    return score


def _taken_apart(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The stored words, row scales and column scales."""
    if isinstance(rows, DeviceScaledRows):
        return rows.values, rows.row_scale, rows.column_scale
    detached = rows.detach()
    return detached.view(torch.int16) if detached.dtype == torch.bfloat16 else detached, None, None


def _decoded(rows: Rows) -> torch.Tensor:
    assert isinstance(rows, DeviceScaledRows)
    return rows.values * rows.row_scale[:, None] * rows.column_scale


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """float32 2^exponents for int32 exponents from -126 to 127, put together from bits: a GPU's `pow` may round."""
    return ((exponents + 127) << 23).view(torch.float32)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _on(device: torch.device) -> Any:
    """Make `device` current: Triton launches on the current CUDA device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
