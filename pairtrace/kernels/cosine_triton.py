"""The GPU kernel behind `pairtrace.kernels.cosine`: imported only when it runs, because Triton is optional.

Letters: N pairs (rows), D width, K directions.

One program scores BLOCK_N rows with BLOCK_K directions. It reads the rows once, sums products and squares in float32
and divides at the end. Up to four directions are summed lane by lane; more go through `tl.dot` in float32 (no TF32).
Rows whose squared norm leaves the float32 range are computed again with an exact power of two, as on the CPU.

The kernel runs on CPU tensors when TRITON_INTERPRET=1 was set before this module was imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from pairtrace.errors import ConfigError

SAFE_LOW = tl.constexpr(2.0**-80)
SAFE_HIGH = tl.constexpr(2.0**126)
SCALE_UP = tl.constexpr(2.0**100)
SCALE_DOWN = tl.constexpr(2.0**-100)


@triton.jit
def _dots(  # type: ignore[no-untyped-def]
    rows_ptr,  # [N, D] float32, float16 or int16 (bfloat16 bits)
    units_ptr,  # [K, D] float32, contiguous
    n,  # [BLOCK_N] int64 row numbers
    k,  # [BLOCK_K] direction numbers
    scale,  # [BLOCK_N] float32
    N,
    K,
    D,
    row_stride,
    column_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    squares = tl.zeros([BLOCK_N], tl.float32)
    dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        values = tl.load(
            rows_ptr + n[:, None] * row_stride + d[None, :] * column_stride,
            mask=(n < N)[:, None] & (d < D)[None, :],
            other=0,
        )
        if (
            rows_ptr.dtype.element_ty == tl.int16
        ):  # exact for denormal bfloat16 too, which the interpreter's cast is not
            values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        values = values.to(tl.float32) * scale[:, None]
        squares += tl.sum(values * values, axis=1)
        units = tl.load(units_ptr + k[:, None] * D + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        if BLOCK_K >= 16:
            dots = tl.dot(values, tl.trans(units), dots, input_precision="ieee")
        else:
            dots += tl.sum(values[:, None, :] * units[None, :, :], axis=2)
    return squares, dots


@triton.jit
def _cosine_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,  # [N, D] float32, float16 or int16 (bfloat16 bits)
    units_ptr,  # [K, D] float32, contiguous
    norms_ptr,  # [N] float32, read only with HAS_NORMS
    out_ptr,  # [N, K] float32, contiguous
    N,
    K,
    D,
    row_stride,
    column_stride,
    HAS_NORMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    squares, dots = _dots(
        rows_ptr, units_ptr, n, k, scale, N, K, D, row_stride, column_stride, BLOCK_N, BLOCK_K, BLOCK_D
    )
    small = squares < SAFE_LOW
    safe = (squares >= SAFE_LOW) & (squares <= SAFE_HIGH)
    retry = (n < N) & (safe == 0)
    if tl.max(retry.to(tl.int32), axis=0) > 0:
        scale = tl.where(safe, 1.0, tl.where(small, SCALE_UP, SCALE_DOWN))
        squares, dots = _dots(
            rows_ptr, units_ptr, n, k, scale, N, K, D, row_stride, column_stride, BLOCK_N, BLOCK_K, BLOCK_D
        )
    infinity = float("inf")
    usable = (squares > 0.0) & (squares < infinity)
    lengths = tl.sqrt(squares)
    if HAS_NORMS:
        norms = tl.load(norms_ptr + n, mask=n < N, other=0.0)
        usable = usable & (norms > 0.0) & (norms < infinity)
        lengths = norms * scale
    scores = tl.where(usable[:, None], dots / lengths[:, None], float("nan"))
    tl.store(out_ptr + n[:, None] * K + k[None, :], scores, mask=(n < N)[:, None] & (k < K)[None, :])


def check_device(rows: torch.Tensor) -> None:
    """Refuse tensors that Triton cannot reach.

    Raises:
        ConfigError: `rows` is neither on a CUDA device nor on the CPU under the interpreter.
    """
    interpreted = not isinstance(_cosine_kernel, triton.JITFunction)
    if rows.device.type == "cuda" or (interpreted and rows.device.type == "cpu"):
        return
    raise ConfigError(
        f"impl='triton' needs a CUDA tensor, but the rows are on {rows.device}; "
        "use impl='auto', or set TRITON_INTERPRET=1 to check the kernel on the CPU"
    )


def _block_sizes(K: int, D: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_K, BLOCK_D."""
    if K <= 4:
        return 8, int(triton.next_power_of_2(K)), min(256, max(16, int(triton.next_power_of_2(D))))
    return 64, min(64, max(16, int(triton.next_power_of_2(K)))), 32


def planned_scores(
    rows: torch.Tensor, units: np.ndarray, norms: np.ndarray | None
) -> Callable[[int, int], torch.Tensor]:
    """Prepare scoring on the device of `rows`.

    Args:
        rows: float32, float16 or bfloat16 [N, D], any strides.
        units: [K, D] unit directions.
        norms: float32 [N] norms to use instead of the rows' own.

    Returns:
        Function that scores rows [start, stop): float32 [stop - start, K] on the device of `rows`.
    """
    device = rows.device
    unit_tensor = torch.from_numpy(np.ascontiguousarray(units, dtype=np.float32)).to(device)
    norm_tensor = None if norms is None else torch.from_numpy(np.ascontiguousarray(norms)).to(device)
    K, D = unit_tensor.shape
    block_n, block_k, block_d = _block_sizes(K, D)

    words = rows.detach().view(torch.int16) if rows.dtype == torch.bfloat16 else rows.detach()

    def score(start: int, stop: int) -> torch.Tensor:
        block = words[start:stop]
        out = torch.empty((stop - start, K), dtype=torch.float32, device=device)
        grid = (triton.cdiv(stop - start, block_n), triton.cdiv(K, block_k))
        with _on(device):
            _cosine_kernel[grid](
                block,
                unit_tensor,
                unit_tensor if norm_tensor is None else norm_tensor[start:stop],
                out,
                stop - start,
                K,
                D,
                block.stride(0),
                block.stride(1),
                HAS_NORMS=norm_tensor is not None,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
            )
        return out

    return score


def _on(device: torch.device) -> Any:
    """Make `device` current: Triton launches on the current CUDA device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
