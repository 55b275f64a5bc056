"""Mean of the hidden states of each segment of a pack, and what a store keeps of a pair of such means.

Letters: T tokens of a pack, D width, S segments, P pairs.

Implementations: `reference` (torch, any device) and `triton` (CUDA; CPU tensors in its interpreter). On the CPU a
segment's mean has the same bits whatever else the pack holds: it is computed from the segment's own tokens, in their
order, in float64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeAlias

from pairtrace.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Impl: TypeAlias = Literal["auto", "reference", "triton"]

StoreDtype: TypeAlias = Literal["float16", "bfloat16", "float32"]

_reported: set[str] = set()


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledDifference:
    """P pairs as a store keeps them, on the device of the hidden states.

    Attributes:
        diff: [P, D] in the store's dtype, mean(chosen) - mean(rejected).
        norm: float32 [P], norm of the difference before it was rounded to that dtype.
        chosen: [P, D] in the store's dtype, where sides were asked for.
        rejected: [P, D] in the store's dtype, where sides were asked for.
    """

    diff: torch.Tensor
    norm: torch.Tensor
    chosen: torch.Tensor | None = None
    rejected: torch.Tensor | None = None


def _reference_mean(hidden: torch.Tensor, segment_of_token: torch.Tensor, n_segments: int) -> torch.Tensor:
    import torch

    # MPS has no float64.
    accumulate = torch.float64 if hidden.device.type in ("cpu", "cuda") else torch.float32
    means = torch.full((n_segments, hidden.shape[1]), torch.nan, dtype=torch.float32, device=hidden.device)
    tokens_by_segment = torch.argsort(segment_of_token, stable=True)
    counts = torch.bincount(segment_of_token + 1, minlength=n_segments + 1).tolist()
    first = counts[0]
    for segment, count in enumerate(counts[1:]):
        tokens = tokens_by_segment[first : first + count]
        first += count
        if count == 0:
            continue
        start, last = int(tokens[0]), int(tokens[-1])
        own = hidden[start : last + 1] if last - start + 1 == count else hidden[tokens]
        # One memory layout for every segment: the order of the additions follows the layout.
        own = own.to(accumulate, memory_format=torch.contiguous_format)
        means[segment] = (own.sum(dim=0) / count).to(torch.float32)
    return means


def _check(hidden: torch.Tensor, segment_of_token: torch.Tensor, n_segments: int) -> None:
    import torch

    if hidden.ndim != 2:
        raise ConfigError(f"hidden must have shape [T, D], not {tuple(hidden.shape)}")
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"hidden must be float32, float16 or bfloat16, not {hidden.dtype}")
    if segment_of_token.shape != hidden.shape[:1] or segment_of_token.dtype != torch.int64:
        raise ConfigError(
            f"segment_of_token must be int64 ({hidden.shape[0]},), one per token, "
            f"not {segment_of_token.dtype} {tuple(segment_of_token.shape)}"
        )
    if segment_of_token.device != hidden.device:
        raise ConfigError(f"hidden is on {hidden.device}, but segment_of_token is on {segment_of_token.device}")
    if n_segments < 0:
        raise ConfigError(f"n_segments must not be negative, but is {n_segments}")
    # On a GPU this would wait for all queued work; there, torch's own index check stops the run.
    if hidden.device.type == "cpu" and segment_of_token.numel():
        low, high = int(segment_of_token.min()), int(segment_of_token.max())
        if low < -1 or high >= n_segments:
            raise ConfigError(f"segments must lie in [-1, {n_segments}), but range from {low} to {high}")


def _load_triton() -> ModuleType:
    try:
        from pairtrace.kernels import pooling_triton
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] == "triton":
            raise MissingDependencyError("triton", "gpu", "pooling on a GPU") from error
        raise
    return pooling_triton


def segment_mean(
    hidden: torch.Tensor,
    segment_of_token: torch.Tensor,
    n_segments: int,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Mean of each segment's tokens.

    Args:
        hidden: float32, float16 or bfloat16 [T, D], any device, any strides.
        segment_of_token: int64 [T] on the same device: segment of each token, -1 where a token is not pooled.
        n_segments: S.
        impl: `auto` takes `triton` on a CUDA device and `reference` elsewhere, and falls back to `reference` with one
            warning; any other choice runs or raises.

    Returns:
        float32 [S, D] on the same device, accumulated in float64 (`reference`) or float32 (`triton`).
        A segment without tokens has no mean: its row is NaN. A NaN or infinity stays within its segment and column.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit, or a segment is out of range (CPU; on a GPU torch stops with
            its own index error).
        MissingDependencyError: `impl="triton"` without the package.
    """
    _check(hidden, segment_of_token, n_segments)
    kernel = _kernel(hidden, impl)
    if kernel is None:
        return _reference_mean(hidden, segment_of_token, n_segments)
    means: torch.Tensor = kernel.segment_mean(hidden, segment_of_token, n_segments)
    return means


def _kernel(hidden: torch.Tensor, impl: Impl) -> ModuleType | None:
    """The Triton implementation, or None for the reference."""
    if impl not in ("auto", "reference", "triton"):
        raise ConfigError(f"impl must be 'auto', 'reference' or 'triton', not {impl!r}")
    if impl == "reference" or (impl == "auto" and hidden.device.type != "cuda"):
        return None
    try:
        kernel = _load_triton()
        kernel.check_device(hidden)
    except MissingDependencyError as error:
        if impl == "triton":
            raise
        if str(error) not in _reported:
            _reported.add(str(error))
            logger.warning("pooling uses the slow reference implementation: %s", error)
        return None
    return kernel


def _reference_difference(
    hidden: torch.Tensor,
    segment_of_token: torch.Tensor,
    n_pairs: int,
    shared_weight: torch.Tensor | None,
    dtype: torch.dtype,
    sides: bool,
) -> tuple[torch.Tensor, ...]:
    import torch

    means = _reference_mean(hidden, segment_of_token, 3 * n_pairs).view(n_pairs, 3, hidden.shape[1])
    both = []
    for number in range(2):
        side = means[:, 1 + number]
        if shared_weight is not None:
            share = shared_weight[:, number, None]
            # Where nothing of the response is shared the leaf's mean is the answer, to the bit.
            side = torch.where(share > 0, side + share * (means[:, 0] - side), side)
        both.append(side)
    difference = both[0] - both[1]
    wide = difference if hidden.device.type == "mps" else difference.double()
    norm = torch.linalg.vector_norm(wide, dim=1).float()
    return difference.to(dtype), norm, *(side.to(dtype) for side in both if sides)


def pooled_difference(
    hidden: torch.Tensor,
    segment_of_token: torch.Tensor,
    n_pairs: int,
    *,
    shared_weight: torch.Tensor | None = None,
    dtype: StoreDtype = "float16",
    sides: bool = False,
    impl: Impl = "auto",
) -> PooledDifference:
    """What a store keeps of the pairs of a pack: nothing wider leaves the kernel.

    Args:
        hidden: as for `segment_mean`.
        segment_of_token: int64 [T] on the same device: `3 * pair` for tokens that both responses share, `3 * pair + 1`
            for the chosen response's own, `3 * pair + 2` for the rejected one's, -1 where a token is not pooled.
        n_pairs: P.
        shared_weight: float32 [P, 2] on the same device, share of (chosen, rejected) tokens that are shared ones; None
            where no token is shared.
        dtype: dtype of the store, rounded to nearest even; values past its range become infinite.
        sides: whether the means of both sides are kept as well.
        impl: as for `segment_mean`.

    Returns:
        Rows of P pairs. A side without tokens of its own makes its pair NaN.

    Raises:
        ConfigError: as for `segment_mean`; `shared_weight` or `dtype` does not fit.
        MissingDependencyError: `impl="triton"` without the package.
    """
    import torch

    if dtype not in ("float16", "bfloat16", "float32"):
        raise ConfigError(f"dtype must be 'float16', 'bfloat16' or 'float32', not {dtype!r}")
    if n_pairs < 0:
        raise ConfigError(f"n_pairs must not be negative, but is {n_pairs}")
    _check(hidden, segment_of_token, 3 * n_pairs)
    if shared_weight is not None and (
        shared_weight.shape != (n_pairs, 2)
        or shared_weight.dtype != torch.float32
        or shared_weight.device != hidden.device
    ):
        raise ConfigError(
            f"shared_weight must be float32 ({n_pairs}, 2) on {hidden.device}, not {shared_weight.dtype} "
            f"{tuple(shared_weight.shape)} on {shared_weight.device}"
        )
    kernel = _kernel(hidden, impl)
    pool = _reference_difference if kernel is None else kernel.pooled_difference
    diff, norm, *others = pool(hidden, segment_of_token, n_pairs, shared_weight, getattr(torch, dtype), sides)
    return PooledDifference(
        diff=diff, norm=norm, chosen=others[0] if sides else None, rejected=others[1] if sides else None
    )
