"""The rows that score highest (or lowest) with each direction, without N x K scores.

Letters: N pairs (rows), D width, K directions, m rows kept per direction.

On a CUDA device the ranking happens in the scoring kernel's registers (`pairtrace.kernels.topk_triton`); elsewhere
blocks of scores pass through `StreamingTopK`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from pairtrace.errors import ConfigError, MissingDependencyError
from pairtrace.kernels.cosine import cosine_blocks
from pairtrace.kernels.cosine_inputs import UnitDirections, check_norms, is_tensor, prepared_directions
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.kernels.topk import StreamingTopK

if TYPE_CHECKING:
    import torch

    from pairtrace.kernels.device_rows import DeviceScaledRows

Impl: TypeAlias = Literal["auto", "reference", "numba", "triton"]
AnyRows: TypeAlias = "np.ndarray | torch.Tensor | ScaledRows | DeviceScaledRows"


class TopK(NamedTuple):
    """The best rows of each direction, best first, ties by the lower row.

    Attributes:
        scores: float32 [K, m], m = min(k, rows that have a score); NaN where a direction has fewer scores.
        rows: int64 [K, m]; -1 where a direction has fewer scores.
        nan_count: rows that have no score: zero, or holding NaN or infinity.
    """

    scores: np.ndarray
    rows: np.ndarray
    nan_count: int


def cosine_topk(
    rows: AnyRows,
    directions: np.ndarray | torch.Tensor | UnitDirections,
    k: int,
    largest: bool = True,
    *,
    minus: AnyRows | None = None,
    impl: Impl = "auto",
    norms: np.ndarray | torch.Tensor | None = None,
    row_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
) -> TopK:
    """The k rows with the largest (or smallest) cosine, per direction.

    Args:
        rows: as for `cosine_scores`; scaled int8 rows on a device as `DeviceScaledRows`.
        directions: [D] or [K, D], as for `cosine_scores`.
        k: rows kept per direction.
        largest: whether the largest scores are kept.
        minus: rejected side, as for `cosine_scores`.
        impl: as for `cosine_scores`.
        norms: as for `cosine_scores`.
        row_dtype: as for `cosine_scores`.

    Returns:
        The first k entries of a full sort of `cosine_scores` per direction, ties by the lower row, NaN left out.

    Raises:
        ConfigError: as for `cosine_scores`; k is below 1; there are 2^32 rows or more on a device.
        DirectionError: as for `cosine_scores`.
        MissingDependencyError: `impl="triton"` without the package.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    if _ranks_on_device(rows, impl):
        return _device_topk(rows, directions, k, largest, minus, norms)  # type: ignore[arg-type]
    units = prepared_directions(directions, rows.shape[1])
    best = StreamingTopK(k, directions=len(units), largest=largest)
    for start, scores in cosine_blocks(
        rows,  # type: ignore[arg-type]  # DeviceScaledRows are ranked on the device
        units,
        minus=minus,  # type: ignore[arg-type]
        impl=impl,
        norms=norms,
        row_dtype=row_dtype,
    ):
        best.update(scores, start)
    found, numbers = best.result()
    return TopK(found, numbers, int(best.nan_count[0]))


def _ranks_on_device(rows: AnyRows, impl: Impl) -> bool:
    """Whether the kernels rank. Where Triton is missing, `auto` goes over scores, as `cosine_scores` says."""
    if isinstance(rows, np.ndarray | ScaledRows):
        return False
    if impl == "triton" or not is_tensor(rows):
        return True
    if impl != "auto" or rows.device.type == "cpu":
        return False
    from importlib.util import find_spec

    return find_spec("triton") is not None


def _device_topk(
    rows: torch.Tensor | DeviceScaledRows,
    directions: np.ndarray | torch.Tensor | UnitDirections,
    k: int,
    largest: bool,
    minus: torch.Tensor | DeviceScaledRows | None,
    norms: np.ndarray | torch.Tensor | None,
) -> TopK:
    try:
        from pairtrace.kernels import cosine_triton, topk_triton
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            raise MissingDependencyError("triton", "gpu", "ranking rows on a GPU") from error
        raise
    import torch

    cosine_triton.check_device(rows)
    units = prepared_directions(directions, rows.shape[1]).exact
    lengths = check_norms(norms, len(rows))
    best = topk_triton.DeviceTopK(cosine_triton.DeviceDirections(units, rows.device), k, largest=largest)
    best.update(
        rows, 0, norms=None if lengths is None else torch.from_numpy(lengths.copy()).to(rows.device), minus=minus
    )
    scores, numbers = best.result()
    return TopK(scores, numbers, best.nan_count)
