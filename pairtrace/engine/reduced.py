"""What a store keeps of computed pairs: difference and norm, in the store's dtype, and which pairs have none.

Legend: n pairs, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from pairtrace.engine.backend import OnPack, Pooled
from pairtrace.engine.rendered import RenderedPair
from pairtrace.engine.rounding import LARGEST, round_rows


@dataclass(frozen=True, slots=True)
class Reduced:
    """Rows of n pairs.

    Attributes:
        diff: [n, L, D] as the store's arrays hold it (bfloat16 as its uint16 bits), but float32 for an int8 store.
        norm: float32 [n, L], of the difference before it was rounded.
        chosen, rejected: [n, L, D] like `diff`, with sides.
        problems: why a pair is quarantined, by its position; its rows mean nothing.
    """

    diff: np.ndarray
    norm: np.ndarray
    chosen: np.ndarray | None = None
    rejected: np.ndarray | None = None
    problems: dict[int, str] = field(default_factory=dict)


@runtime_checkable
class ReducingBackend(Protocol):
    """A back end that reduces pairs where it pools them, so that nothing wider leaves its workers."""

    layers: tuple[int, ...]
    width: int
    compute_dtype: str

    def reduce(
        self, pairs: Sequence[RenderedPair], *, dtype: str, sides: bool, on_pack: OnPack | None = None
    ) -> Reduced:
        """The rows of `pairs`, in order; `dtype` is the store's."""


def reduce_pooled(pooled: Pooled, dtype: str, sides: bool) -> Reduced:
    """The rows of pooled pairs."""
    chosen, rejected = pooled.chosen, pooled.rejected
    with np.errstate(invalid="ignore"):
        difference = chosen - rejected
        kept = [difference, chosen, rejected] if sides else [difference]
        peak = np.maximum.reduce([np.abs(values).max(axis=(1, 2), initial=0.0) for values in kept])
    finite = [np.isfinite(side).all(axis=(1, 2)) for side in (chosen, rejected)]
    problems = problems_of(peak, finite[0], finite[1], dtype, pooled.failed)
    good = np.ones(len(peak), dtype=bool)
    good[list(problems)] = False
    # Rows that are not kept may not be representable.
    difference, chosen, rejected = (
        np.where(good[:, None, None], values, np.float32(0)) for values in (difference, chosen, rejected)
    )
    return Reduced(
        diff=encode(difference, dtype),
        norm=np.linalg.norm(difference.astype(np.float64), axis=2).astype(np.float32),
        chosen=encode(chosen, dtype) if sides else None,
        rejected=encode(rejected, dtype) if sides else None,
        problems=problems,
    )


def problems_of(
    peak: np.ndarray,
    chosen_finite: np.ndarray,
    rejected_finite: np.ndarray,
    dtype: str,
    failed: Iterable[int] = (),
) -> dict[int, str]:
    """Reasons to quarantine computed pairs, by their position.

    Args:
        peak: float [n], the largest magnitude of what would be stored.
        chosen_finite, rejected_finite: bool [n].
        dtype: of the store.
        failed: positions that did not fit into memory.
    """
    problems = dict.fromkeys(failed, "out_of_memory: the pair does not fit into memory; lower --max-length")
    for name, finite in (("chosen", chosen_finite), ("rejected", rejected_finite)):
        for number in np.flatnonzero(~finite):
            problems.setdefault(int(number), f"nonfinite_activations: the mean of {name} is NaN or infinite")
    for number in np.flatnonzero(peak > LARGEST[dtype]):
        problems.setdefault(
            int(number), f"overflow: a value of {peak[number]:.4g} does not fit into {dtype}; use --dtype float32"
        )
    return problems


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Cast float32 rows to a store dtype, rounding to nearest even; bfloat16 comes as its uint16 bits.

    Rows of an int8 store stay float32 until the writer rounds the whole shard.
    """
    rounded = values if dtype == "int8" else round_rows(values, "float32", dtype)
    assert isinstance(rounded, np.ndarray)
    return rounded
