"""What is kept of per-pair gradients: a projection, or products with one target.

Legend: B pairs, K dimensions of the projection, P parameters of the adapter, n entries of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pairtrace.engine.baselines.gradient_projection import SparseProjection
from pairtrace.engine.baselines.gradient_rows import Parts, adam_directions

# Matrices are projected together until they have this many entries: small ones would cost a pass over K each.
_BLOCK = 1 << 20


def preconditioned(parts: Parts, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Parts:
    """Gradients as Adam's directions, see `adam_directions`; moments by name of the matrix, float32 [n]."""
    for name, gradients in parts:
        yield name, adam_directions(gradients, first[name], second[name])


def projected_rows(parts: Parts, projection: SparseProjection) -> Tensor:
    """Projected gradients as unit vectors, float32 [B, K]; NaN where one is zero or not finite."""
    total: Tensor | None = None
    waiting: list[Tensor] = []
    first = size = 0

    def flush() -> None:
        nonlocal total, first, size
        part = projection.project(first, torch.cat(waiting, dim=1))
        total = part if total is None else total + part
        first, size = first + size, 0
        waiting.clear()

    for _, gradients in parts:
        waiting.append(gradients)
        size += gradients.shape[1]
        if size >= _BLOCK:
            flush()
    if waiting:
        flush()
    assert total is not None
    norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    return torch.where(torch.isfinite(norms) & (norms > 0), total / norms, torch.nan)


def target_products(parts: Parts, target: Mapping[str, Tensor]) -> Tensor:
    """Dot product with the target gradient, and the gradient's own norm: float64 [B, 2].

    Args:
        parts: of the pairs.
        target: mean gradient of the target pairs by name of the matrix, float32 [n].
    """
    dots: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    for name, gradients in parts:
        dots = dots + (gradients @ target[name]).double()
        squares = squares + torch.linalg.vector_norm(gradients, dim=1).double() ** 2
    assert isinstance(dots, Tensor) and isinstance(squares, Tensor)
    return torch.stack([dots, squares.sqrt()], dim=1)


def summed_rows(parts: Parts, *, unit: bool) -> Tensor | None:
    """Sum of the gradients of a batch, float32 [P]; None when one of them is not finite, or zero and `unit`.

    Args:
        parts: of the pairs; with `unit` those of a batch are in memory together, B P numbers.
        unit: each divided by its own norm first.
    """
    if unit:
        gradients = torch.cat([part for _, part in parts], dim=1)
        total = (gradients / torch.linalg.vector_norm(gradients, dim=1, keepdim=True)).sum(dim=0)
    else:
        total = torch.cat([part.sum(dim=0) for _, part in parts])
    return total if bool(torch.isfinite(total).all()) else None
