"""Cosine of many rows with one or more directions: `dot(v, b) / (|v| |b|)`.

Letters: N pairs (rows), D width, K directions.

Rows are never converted as a whole: the kernels read them in their stored format, the reference goes by blocks.
A row that is zero or holds NaN or infinity scores NaN, never 0. Every other row has a finite score, whatever its
magnitude (denormal rows and rows whose squared norm leaves the float32 range included); rounding can carry a score past
1 by a few float32 steps.

Implementations: `reference` (NumPy, float64), `numba` (CPU), `triton` (CUDA tensors; CPU tensors in its interpreter).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np

from pairtrace.errors import ConfigError, MissingDependencyError
from pairtrace.kernels.cosine_inputs import (
    check_norms,
    check_rows,
    host_words,
    is_tensor,
    rows_are_dense,
    unit_directions,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Impl: TypeAlias = Literal["auto", "reference", "numba", "triton"]
RowDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Array: TypeAlias = "np.ndarray | torch.Tensor"
RowsT = TypeVar("RowsT", np.ndarray, "torch.Tensor")

# Up to this many directions it is faster to decode a row again for every four of them than to keep it in float32.
FUSED_DIRECTIONS = 8
# Values (4 to 8 bytes each) that a block of converted rows or of scores may hold.
BLOCK_VALUES = 1 << 20
# Scores per call of a kernel that reads the rows in place.
IN_PLACE_BLOCK_VALUES = 1 << 22
DEVICE_BLOCK_VALUES = 1 << 26

_reported: set[str] = set()


def _reference_block(words: np.ndarray, units: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
    """The plain definition.

    Args:
        words: float32, float16 or int16 (bfloat16 bits) [n, D].
        units: float64 [K, D] unit directions.
        norms: float32 [n] norms to use instead of the rows' own.

    Returns:
        float32 [n, K].
    """
    if words.dtype == np.int16:
        words = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        rows = words.astype(np.float64)
        own = np.sqrt(np.square(rows).sum(axis=1))
        lengths = own if norms is None else norms.astype(np.float64)
        usable = (own > 0) & np.isfinite(own) & (lengths > 0) & np.isfinite(lengths)
        scores: np.ndarray = ((rows @ units.T) / lengths[:, None]).astype(np.float32)
    scores[~usable] = np.nan
    return scores


def _numba_block(words: np.ndarray, units: np.ndarray, norms: np.ndarray | None, count: int) -> np.ndarray:
    """Scores of one block through the compiled kernels.

    Args:
        words: as for the reference; any strides.
        units: float32 unit directions, padded as the kernels ask.
        norms: as for the reference.
        count: K.

    Returns:
        float32 [n, K].
    """
    from pairtrace.kernels import cosine_numba

    n, width = words.shape
    if n == 0:
        return np.empty((0, count), np.float32)
    if words.dtype == np.float16:
        words = words.view(np.uint16)
    if not rows_are_dense(words):
        words = np.ascontiguousarray(words)
    size = words.itemsize
    stride = words.strides[0] // size if n > 1 else width
    flat = np.lib.stride_tricks.as_strided(words, ((n - 1) * stride + width,), (size,), writeable=False)
    lengths = np.empty(0, np.float32) if norms is None else np.array(norms)
    scores = np.empty((n, count), np.float32)
    kernel = cosine_numba.fused_scores if count <= FUSED_DIRECTIONS else cosine_numba.tiled_scores
    kernel(flat, stride, units, lengths, scores)
    return scores


def _fall_back(reason: str) -> None:
    if reason not in _reported:
        _reported.add(reason)
        logger.warning("cosine scores use the slow reference implementation: %s", reason)


def _load_triton() -> ModuleType:
    try:
        from pairtrace.kernels import cosine_triton
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            raise MissingDependencyError("triton", "gpu", "cosine scoring on a GPU") from error
        raise
    return cosine_triton


def _choose(impl: Impl, rows: Array) -> Impl:
    """Resolve `impl` to something that can run, or raise. Only `auto` falls back, and says so once."""
    if impl not in ("auto", "reference", "numba", "triton"):
        raise ConfigError(f"impl must be 'auto', 'reference', 'numba' or 'triton', not {impl!r}")
    on_host = isinstance(rows, np.ndarray) or rows.device.type == "cpu"
    if impl == "numba" and not on_host:
        raise ConfigError("impl='numba' needs rows in host memory, but they are on a device; use impl='triton'")
    if impl == "triton":
        if isinstance(rows, np.ndarray):
            raise ConfigError("impl='triton' needs a torch tensor, but the rows are a numpy array; use impl='numba'")
        _load_triton().check_device(rows)
    if impl != "auto":
        return impl
    try:
        if on_host:
            from pairtrace.kernels import cosine_numba  # noqa: F401

            return "numba"
        _load_triton().check_device(rows)
    except (ImportError, MissingDependencyError, ConfigError) as error:
        _fall_back(str(error))
        return "reference"
    return "triton"


def _plan(
    rows: Array, directions: Array, impl: Impl, norms: Array | None, row_dtype: RowDtype | None
) -> tuple[int, int, Callable[[int, int], Array]]:
    """Check the arguments and choose the implementation.

    Returns:
        K, the rows per block, and the function that scores rows [start, stop) as float32 [stop - start, K].
    """
    check_rows(rows, row_dtype)
    count, width = rows.shape
    units = unit_directions(directions, width)
    lengths = check_norms(norms, count)
    chosen = _choose(impl, rows)
    K = len(units)
    dense_block = max(1, BLOCK_VALUES // max(width, K))

    def block_norms(start: int, stop: int) -> np.ndarray | None:
        return None if lengths is None else lengths[start:stop]

    if chosen == "triton":
        score_tensor = _load_triton().planned_scores(rows, units, lengths)
        return K, max(1, DEVICE_BLOCK_VALUES // K), score_tensor
    if chosen == "reference":
        return (
            K,
            dense_block,
            lambda start, stop: _reference_block(
                host_words(rows[start:stop], row_dtype), units, block_norms(start, stop)
            ),
        )
    padding = -K % 4 if K > 1 else 0
    small_units = np.concatenate([units, np.zeros((padding, width))]).astype(np.float32)
    in_place = rows_are_dense(host_words(rows, row_dtype))
    return (
        K,
        max(1, IN_PLACE_BLOCK_VALUES // K) if in_place else dense_block,
        lambda start, stop: _numba_block(
            host_words(rows[start:stop], row_dtype), small_units, block_norms(start, stop), K
        ),
    )


def cosine_scores(
    rows: RowsT,
    directions: Array,
    *,
    impl: Impl = "auto",
    norms: Array | None = None,
    row_dtype: RowDtype | None = None,
) -> RowsT:
    """Cosine of every row with every direction.

    Args:
        rows: [N, D] numpy array (float32, float16, or uint16 holding bfloat16 bits with `row_dtype="bfloat16"`; memory
            maps, read-only and strided arrays included) or torch tensor (float32, float16, bfloat16; any device).
        directions: [D] or [K, D], any real dtype; they need not be normalized. [D] counts as K = 1.
        impl: `auto` takes `numba` in host memory and `triton` on a GPU, and falls back to `reference` with one
            warning; any other choice runs or raises.
        norms: float32 [N] norms |v| to divide by instead of those of `rows` (for example from before rounding to
            float16). A row whose given norm is zero or not finite scores NaN.
        row_dtype: what the words of a uint16 array are.

    Returns:
        float32 [N, K], a numpy array for numpy rows and a tensor on the same device for tensor rows.
        NaN where a row is zero or holds a value that is not finite.

    Raises:
        ConfigError: rows, norms or `impl` cannot be used.
        DirectionError: a direction has another width, is zero, or holds a value that is not finite.
        MissingDependencyError: `impl="triton"` without the package.
    """
    K, block_rows, score = _plan(rows, directions, impl, norms, row_dtype)
    out = _empty_like(rows, (len(rows), K))
    for start in range(0, len(rows), block_rows):
        stop = min(start + block_rows, len(rows))
        out[start:stop] = _same_kind(score(start, stop), rows)
    return out


def cosine_max(
    rows: RowsT,
    bank: Array,
    *,
    impl: Impl = "auto",
    norms: Array | None = None,
    row_dtype: RowDtype | None = None,
) -> RowsT:
    """Largest cosine of every row over a bank of directions (arXiv 2602.11079, vector bank); it may be negative.

    Args:
        rows: as for `cosine_scores`.
        bank: [K, D] directions, as for `cosine_scores`.
        impl: as for `cosine_scores`.
        norms: as for `cosine_scores`.
        row_dtype: as for `cosine_scores`.

    Returns:
        float32 [N]; NaN where the row has no cosine. Scores for all K exist for one block of rows at a time.

    Raises:
        ConfigError: as for `cosine_scores`.
        DirectionError: as for `cosine_scores`.
        MissingDependencyError: as for `cosine_scores`.
    """
    _, block_rows, score = _plan(rows, bank, impl, norms, row_dtype)
    out = _empty_like(rows, (len(rows),))
    for start in range(0, len(rows), block_rows):
        stop = min(start + block_rows, len(rows))
        scores = score(start, stop)
        largest = scores.max(axis=1) if isinstance(scores, np.ndarray) else scores.amax(dim=1)
        out[start:stop] = _same_kind(largest, rows)
    return out


def _empty_like(rows: RowsT, shape: tuple[int, ...]) -> RowsT:
    """Uninitialized float32 array of the kind and on the device of `rows`."""
    if isinstance(rows, np.ndarray):
        return np.empty(shape, np.float32)
    import torch

    return torch.empty(shape, dtype=torch.float32, device=rows.device)


def _same_kind(values: Array, rows: Array) -> Any:
    """`values` as a tensor where the rows are one."""
    if isinstance(values, np.ndarray) and is_tensor(rows):
        import torch

        return torch.from_numpy(values)
    return values
