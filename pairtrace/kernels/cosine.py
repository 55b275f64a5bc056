"""Cosine of many rows with one or more directions: `dot(v, b) / (|v| |b|)`.

Letters: N pairs (rows), D width, K directions.

Rows are never converted as a whole: the kernels read them in their stored format, the reference goes by blocks. With
`minus` the scores are those of the differences of two sides, which are never stored.
A row that is zero or holds NaN or infinity scores NaN, never 0. Every other row has a finite score, whatever its
magnitude (denormal rows and rows whose squared norm leaves the float32 range included); rounding can carry a score past
1 by a few float32 steps.

Equal calls give equal bits, whatever the number of threads. Up to `FUSED_DIRECTIONS` directions on the CPU the bits of
a score do not even depend on the other rows of the call; beyond, blocks of rows go through a matrix product whose
last bits may depend on the size of a block.

Implementations: `reference` (NumPy, float64), `numba` (CPU), `triton` (CUDA tensors; CPU tensors in its interpreter).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from pairtrace.errors import ConfigError, MissingDependencyError
from pairtrace.kernels.cosine_inputs import (
    HostRows,
    UnitDirections,
    check_minus,
    check_norms,
    check_rows,
    host_rows,
    is_tensor,
    prepare_directions,
    prepared_directions,
)
from pairtrace.kernels.int8 import ScaledRows

if TYPE_CHECKING:
    import torch

__all__ = ["UnitDirections", "cosine_blocks", "cosine_max", "cosine_scores", "prepare_directions"]

logger = logging.getLogger(__name__)

Impl: TypeAlias = Literal["auto", "reference", "numba", "triton"]
RowDtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Array: TypeAlias = "np.ndarray | torch.Tensor"
Rows: TypeAlias = "np.ndarray | torch.Tensor | ScaledRows"
Directions: TypeAlias = "np.ndarray | torch.Tensor | UnitDirections"

# Up to this many directions one pass over the rows is faster than a matrix product.
FUSED_DIRECTIONS = 32
# Values (4 to 8 bytes each) that a block of converted rows or of scores may hold.
BLOCK_VALUES = 1 << 20
# Scores that exist at a time where a caller takes them block by block and rows are read in place.
IN_PLACE_BLOCK_VALUES = 1 << 22
DEVICE_BLOCK_VALUES = 1 << 26

_reported: set[str] = set()


def _reference_block(rows: HostRows, minus: HostRows | None, units: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
    """The plain definition.

    Args:
        rows: n rows.
        minus: n rows to subtract.
        units: float64 [K, D] unit directions.
        norms: float32 [n] norms to use instead of the rows' own.

    Returns:
        float32 [n, K].
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        values = rows.exact() if minus is None else rows.exact() - minus.exact()
        own = np.sqrt(np.square(values).sum(axis=1))
        lengths = own if norms is None else norms.astype(np.float64)
        usable = (own > 0) & np.isfinite(own) & (lengths > 0) & np.isfinite(lengths)
        scores: np.ndarray = ((values @ units.T) / lengths[:, None]).astype(np.float32)
    scores[~usable] = np.nan
    return scores


def _numba_block(
    rows: HostRows, minus: HostRows | None, units: UnitDirections, norms: np.ndarray | None, out: np.ndarray
) -> None:
    """Scores of one block through the compiled kernels.

    Args:
        rows: n rows, any strides.
        minus: n rows to subtract.
        units: K unit directions.
        norms: as for the reference.
        out: float32 [n, K], contiguous, overwritten.
    """
    from pairtrace.kernels import cosine_numba

    if len(rows) == 0:
        return
    side = cosine_numba.Side.of(rows)
    other = cosine_numba.NO_SIDE if minus is None else cosine_numba.Side.of(minus)
    lengths = None if norms is None else np.ascontiguousarray(norms)
    if len(units) <= FUSED_DIRECTIONS:
        cosine_numba.fused_scores(side, other, units.padded, rows.words.shape[1], lengths, out)
        return
    from pairtrace.kernels import cosine_product

    cosine_product.product_scores(side, other, units.columns, lengths, out)


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


def _choose(impl: Impl, rows: Array | ScaledRows) -> Impl:
    """Resolve `impl` to something that can run, or raise. Only `auto` falls back, and says so once."""
    if impl not in ("auto", "reference", "numba", "triton"):
        raise ConfigError(f"impl must be 'auto', 'reference', 'numba' or 'triton', not {impl!r}")
    on_host = isinstance(rows, np.ndarray | ScaledRows) or rows.device.type == "cpu"
    if impl == "numba" and not on_host:
        raise ConfigError("impl='numba' needs rows in host memory, but they are on a device; use impl='triton'")
    if impl == "triton":
        if isinstance(rows, np.ndarray | ScaledRows):
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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How one call is computed.

    Attributes:
        rows: the caller's, whose kind the results have.
        directions: K.
        block_rows: rows per block where scores exist block by block.
        all_rows: rows per block where the caller holds all scores anyway.
        score: scores of rows [start, stop), float32 [stop - start, K], in the host array given or in one of its own.
        on_host: whether `score` needs a host array.
    """

    rows: Rows
    directions: int
    block_rows: int
    all_rows: int
    score: Callable[[int, int, np.ndarray | None], Array]
    on_host: bool

    def empty(self, *shape: int) -> Any:
        """Uninitialized float32 array of the kind and on the device of the rows."""
        if not is_tensor(self.rows):
            return np.empty(shape, np.float32)
        import torch

        return torch.empty(shape, dtype=torch.float32, device=self.rows.device)  # type: ignore[union-attr]

    def host_array(self, out: Array) -> np.ndarray | None:
        """What `score` may write to so that its scores stand in `out`."""
        if isinstance(out, np.ndarray) or not self.on_host:
            return out if isinstance(out, np.ndarray) else None
        host: np.ndarray = (out if out.device.type == "cpu" else out.cpu()).numpy()
        return host

    def like_rows(self, values: Array) -> Any:
        """`values` as a tensor where the rows are one."""
        if isinstance(values, np.ndarray) and is_tensor(self.rows):
            import torch

            return torch.from_numpy(values)
        return values

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """Start and scores of every block; the next step may overwrite them."""
        count = len(self.rows)
        buffer = np.empty((min(self.block_rows, count), self.directions), np.float32) if self.on_host else None
        for start in range(0, count, self.block_rows):
            stop = min(start + self.block_rows, count)
            target = None if buffer is None else buffer[: stop - start]
            yield start, self.like_rows(self.score(start, stop, target))


def _plan(
    rows: Rows,
    directions: Directions,
    minus: Rows | None,
    impl: Impl,
    norms: Array | None,
    row_dtype: RowDtype | None,
) -> _Plan:
    """Check the arguments and choose the implementation."""
    check_rows(rows, row_dtype)
    if minus is not None:
        check_minus(minus, rows, row_dtype)
    count, width = rows.shape
    units = prepared_directions(directions, width)
    lengths = check_norms(norms, count)
    chosen = _choose(impl, rows)
    K = len(units)
    if chosen == "triton":
        score_tensor = _load_triton().planned_scores(rows, units.exact, lengths, minus)
        size = max(1, DEVICE_BLOCK_VALUES // K)
        return _Plan(
            rows=rows,
            directions=K,
            block_rows=size,
            all_rows=size,
            score=lambda start, stop, out: score_tensor(start, stop),
            on_host=False,
        )
    side = host_rows(rows, row_dtype)
    other = None if minus is None else host_rows(minus, row_dtype)
    converted = max(1, BLOCK_VALUES // max(width, K))
    in_place = chosen == "numba" and side.dense and (other is None or other.dense)

    def score(start: int, stop: int, out: np.ndarray | None) -> np.ndarray:
        part = side[start:stop]
        other_part = None if other is None else other[start:stop]
        part_lengths = None if lengths is None else lengths[start:stop]
        if chosen == "reference":
            return _reference_block(part, other_part, units.exact, part_lengths)
        assert out is not None
        _numba_block(part, other_part, units, part_lengths, out)
        return out

    block_rows = max(1, IN_PLACE_BLOCK_VALUES // K) if in_place else converted
    if in_place and K > FUSED_DIRECTIONS:
        from pairtrace.kernels import cosine_product

        block_rows = cosine_product.whole_blocks(block_rows, width, K)
    return _Plan(
        rows=rows,
        directions=K,
        block_rows=block_rows,
        all_rows=max(1, count) if in_place else converted,
        score=score,
        on_host=True,
    )


def cosine_scores(
    rows: Rows,
    directions: Directions,
    *,
    minus: Rows | None = None,
    impl: Impl = "auto",
    norms: Array | None = None,
    row_dtype: RowDtype | None = None,
) -> Any:
    """Cosine of every row with every direction.

    Args:
        rows: [N, D] numpy array (float32, float16, or uint16 holding bfloat16 bits with `row_dtype="bfloat16"`; memory
            maps, read-only and strided arrays included), `ScaledRows`, or torch tensor (float32, float16, bfloat16;
            any device).
        directions: [D] or [K, D], any real dtype; they need not be normalized. [D] counts as K = 1. Who scores many
            blocks of rows passes what `prepare_directions` makes of them once.
        minus: the rejected side, of the same kind and shape: scores are those of `rows - minus`.
        impl: `auto` takes `numba` in host memory and `triton` on a GPU, and falls back to `reference` with one
            warning; any other choice runs or raises.
        norms: float32 [N] norms |v| to divide by instead of those of `rows` (for example from before rounding to
            float16). A row whose given norm is zero or not finite scores NaN.
        row_dtype: what the words of a uint16 array are.

    Returns:
        float32 [N, K], a tensor on the same device for tensor rows, else a numpy array.
        NaN where a row is zero or holds a value that is not finite.

    Raises:
        ConfigError: rows, minus, norms or `impl` cannot be used.
        DirectionError: a direction has another width, is zero, or holds a value that is not finite.
        MissingDependencyError: `impl="triton"` without the package.
    """
    plan = _plan(rows, directions, minus, impl, norms, row_dtype)
    count = len(rows)
    out = plan.empty(count, plan.directions)
    host = plan.host_array(out)
    for start in range(0, count, plan.all_rows):
        stop = min(start + plan.all_rows, count)
        target = None if host is None else host[start:stop]
        scores = plan.score(start, stop, target)
        if scores is not target:
            out[start:stop] = plan.like_rows(scores)
    return out


def cosine_blocks(
    rows: Rows,
    directions: Directions,
    *,
    minus: Rows | None = None,
    impl: Impl = "auto",
    norms: Array | None = None,
    row_dtype: RowDtype | None = None,
) -> Iterator[tuple[int, Any]]:
    """The scores of `cosine_scores` block by block, so that not all N x K exist at a time.

    Args:
        rows: as for `cosine_scores`.
        directions: as for `cosine_scores`.
        minus: as for `cosine_scores`.
        impl: as for `cosine_scores`.
        norms: as for `cosine_scores`.
        row_dtype: as for `cosine_scores`.

    Returns:
        Iterator over the first row of a block and its scores, float32 [n, K]. The next step may overwrite the scores:
        copy what has to last. Block sizes depend on shapes and dtype alone; where rows are read in place the bits are
        those of `cosine_scores`.

    Raises:
        ConfigError: as for `cosine_scores`, at once.
        DirectionError: as for `cosine_scores`, at once.
        MissingDependencyError: as for `cosine_scores`, at once.
    """
    return _plan(rows, directions, minus, impl, norms, row_dtype).blocks()


def cosine_max(
    rows: Rows,
    bank: Directions,
    *,
    minus: Rows | None = None,
    impl: Impl = "auto",
    norms: Array | None = None,
    row_dtype: RowDtype | None = None,
) -> Any:
    """Largest cosine of every row over a bank of directions (arXiv 2602.11079, vector bank); it may be negative.

    Args:
        rows: as for `cosine_scores`.
        bank: [K, D] directions, as for `cosine_scores`.
        minus: as for `cosine_scores`.
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
    plan = _plan(rows, bank, minus, impl, norms, row_dtype)
    out = plan.empty(len(rows))
    for start, scores in plan.blocks():
        largest = scores.max(axis=1) if isinstance(scores, np.ndarray) else scores.amax(dim=1)
        out[start : start + len(scores)] = largest
    return out
