"""Unit rows of any number, reduced to a few dimensions by randomised principal components on Dask.

Letters: N rows, n rows of a chunk, D width, r reduced width, l width of the sketch.

Sums [D, l] and reduced rows [n, r] are all that travels between processes.

Rows are divided by their norms, so that a pair with long responses weighs no more than another, and once more after
the projection: a row whose direction lies mostly outside the components would otherwise land near the origin, and all
such rows together in one dense ball, a cluster of noise. How much of a row the projection keeps is told apart.

The mean is not subtracted: cosines between rows stay what `score` measures, and in trials noise stayed noise. With
the mean subtracted, rows of no cluster all point away from a cluster that holds most rows, and so become one: on
planted clusters with noise (D = 256, r = 50), of which one holds 96 % of the members, 96 % of the noise came out as
noise as it is here, and none of it with the mean subtracted. Where all rows share a direction (mean cosine 0.83), 64 %
came out as noise here and 91 % with the mean subtracted; on a preference data set of 4,000 pairs (mean cosine 0.03)
there was no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.engine.dask_cluster import one_thread
from pairtrace.engine.discovery.chunk_tasks import map_chunks, sum_chunks
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError, DataError
from pairtrace.kernels.half import half_to_float32
from pairtrace.kernels.norms import row_norms

if TYPE_CHECKING:
    import dask.array

# Passes over the rows, each multiplying by X^T X. With its eigenvalues v, the direction of component j is found up to
# an angle that shrinks as (v[l] / v[j])^4; the last pass finds the components inside the sketch.
PASSES = 5
# Columns of the sketch beyond the components wanted (Halko, Martinsson and Tropp 2011, section 4.2: 5 or 10).
_OVERSAMPLING = 10
# A smaller share, or a shorter row, is what float32 has left over.
_ROUNDING = 1e-6
# Values of the rows that are float32 at a time: 4 MB.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Reduction:
    """From rows of width D to points of width r.

    Attributes:
        components: float32 [r, D], orthonormal, the one that holds most of the rows first.
        share: float32 [r], of the squared norms of the unit rows; together the mean of `kept` squared.
        mean_cosine: of two rows, on average over all. Near 1 they all share a direction, and little else tells them
            apart.
    """

    components: np.ndarray
    share: np.ndarray
    mean_cosine: float

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Unit rows float32 [n, r] of rows [n, D] of any floating dtype; NaN for rows without direction."""
        return self.project(rows)[0]

    def project(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `apply`, and how much of each row the projection keeps: float32 [n], NaN for rows without direction.

        That is the norm of the projected row over the norm before: 1 for a row among the components, about the square
        root of r / D for one that points anywhere.
        """
        points = np.full((len(rows), len(self.components)), np.nan, np.float32)
        kept = np.full(len(rows), np.nan, np.float32)
        for part, block in _blocks(rows):
            unit, directed = _unit_rows(block)
            found = unit @ self.components.T
            inside = np.sqrt(np.square(found).sum(axis=1))
            usable = inside > _ROUNDING  # else it is at right angles to all components
            where = part.start + np.flatnonzero(directed)[usable]
            points[where] = found[usable] / inside[usable, None]
            kept[where] = np.minimum(inside[usable], 1.0)
        return points, kept


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducedRows:
    """Rows after the reduction.

    Attributes:
        points: float32 [N, r], unit rows; NaN for rows without direction.
        kept: float32 [N], see `Reduction.project`.
    """

    points: np.ndarray
    kept: np.ndarray


def fit_reduction(
    rows: dask.array.Array, r: int, *, seed: int, client: Any, progress: Progress = NULL_PROGRESS
) -> Reduction:
    """Principal components of unit rows about the origin: randomised subspace iteration, out of core.

    Algorithm 4.4 of Halko, Martinsson and Tropp (2011, "Finding structure with randomness") with A = X^T for unit rows
    X: both products of an iteration are made in one pass, X^T (X Q), summed in float64, and Q is made orthonormal
    between passes. The components are the Rayleigh-Ritz vectors of the last pass. Where the whole X^T X [D, D] costs no
    more than the passes, it is summed in a single one instead and the components are exact.

    The same rows in the same chunks give the same bits, whatever the workers: sums of chunks are added up in a tree
    that depends on their order in `rows` only.

    Args:
        rows: [N, D] of a floating dtype, of known chunks along N and one along D. Rows that are zero or not finite
            are left out.
        r: components wanted. There are fewer where D, or the number of directions that the rows span, is smaller.
        seed: of the random start.
        client: a `distributed.Client`.
        progress: receives the passes, in rows.

    Raises:
        ConfigError: r is below 1, or the cluster fails.
        DataError: no row has a direction, or all have the same one.
        StoreError: what the chunks raise.
    """
    if r < 1:
        raise ConfigError(f"{r} components were asked for; expected at least 1")
    width = rows.shape[1]
    sketch = min(width, r + _OVERSAMPLING)
    passes = 1 if width <= 2 * PASSES * sketch else PASSES
    progress.start("principal components", passes * len(rows), "rows")
    if passes == 1:
        basis = np.eye(width, dtype=np.float32)
    else:
        basis = _orthonormal(np.random.default_rng(seed).standard_normal((width, sketch)))
    moment = _pass(rows, basis, client, progress)
    for _ in range(passes - 1):
        basis = _orthonormal(moment.products)
        moment = _pass(rows, basis, client, progress)
    progress.finish()
    return _components(basis, moment, r)


def reduce_rows(
    rows: dask.array.Array, reduction: Reduction, client: Any, progress: Progress = NULL_PROGRESS
) -> ReducedRows:
    """`Reduction.project` of all rows, one task per chunk.

    Args:
        rows: as for `fit_reduction`.
        reduction: of their width.
        client: a `distributed.Client`.
        progress: receives the rows done.

    Raises:
        ConfigError: the cluster fails.
        StoreError: what the chunks raise.
    """
    progress.start("reduce", len(rows), "rows")
    points = np.empty((len(rows), len(reduction.components)), np.float32)
    kept = np.empty(len(rows), np.float32)
    for part, (chunk_points, chunk_kept) in map_chunks(rows, _project_chunk, reduction, client, progress):
        points[part], kept[part] = chunk_points, chunk_kept
    progress.finish()
    return ReducedRows(points=points, kept=kept)


# Here


@dataclass(frozen=True)
class _Moment:
    """X^T X / N of unit rows times a basis, float64 [D, l], and the squared norm of their mean."""

    products: np.ndarray
    mean_cosine: float


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    with _one_thread_here():
        return np.linalg.qr(vectors)[0].astype(np.float32)


def _pass(rows: dask.array.Array, basis: np.ndarray, client: Any, progress: Progress) -> _Moment:
    """One pass over the rows with a basis float32 [D, l]; a square one is the identity."""
    given = None if len(basis) == basis.shape[1] else basis
    count, total, products = sum_chunks(rows, _chunk_sums, given, client, progress)
    if not count:
        raise DataError("no row has a direction: all are zero or not finite; there is nothing to cluster")
    mean_cosine = float(np.square(total / count).sum())
    if mean_cosine > 1.0 - _ROUNDING:
        raise DataError(f"all {count} rows that have a direction have the same one; there is nothing to tell apart")
    return _Moment(products / count, mean_cosine)


def _components(basis: np.ndarray, moment: _Moment, r: int) -> Reduction:
    with _one_thread_here():
        wide = basis.astype(np.float64)
        inner = wide.T @ moment.products
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        best = np.argsort(-values, kind="stable")[:r]
        best = best[values[best] > _ROUNDING]
        components = (wide @ vectors[:, best]).T
    # The sign of a component means nothing; this one is the same on every machine.
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return Reduction(
        components=np.ascontiguousarray(components * np.sign(largest), np.float32),
        share=values[best].astype(np.float32),
        mean_cosine=moment.mean_cosine,
    )


def _one_thread_here() -> Any:
    """The last bits of a decomposition depend on the number of threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


# On the workers


def _chunk_sums(rows: np.ndarray, *, given: np.ndarray | None) -> tuple[int, np.ndarray, np.ndarray]:
    """Of unit rows X: their number, their sum float64 [D], and X^T X times what is given, float64 [D, l]."""
    width = rows.shape[1]
    count, total, products = 0, np.zeros(width), np.zeros((width, width if given is None else given.shape[1]))
    with one_thread():
        for _, block in _blocks(rows):
            unit = _unit_rows(block)[0]
            count += len(unit)
            total += unit.sum(axis=0, dtype=np.float64)
            products += unit.T @ (unit if given is None else unit @ given)
    return count, total, products


def _project_chunk(rows: np.ndarray, *, given: Reduction) -> tuple[np.ndarray, np.ndarray]:
    with one_thread():
        return given.project(rows)


def _blocks(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, _BLOCK_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, rows[part]


def _unit_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have a direction divided by their norms, float32, of a fresh array; and which they are, bool [n]."""
    with np.errstate(over="ignore"):  # beyond the range of float32 is infinite, and has no direction here
        wide = half_to_float32(rows) if rows.dtype == np.float16 else rows.astype(np.float32)
        norms = row_norms(wide).astype(np.float32)
    directed = np.isfinite(norms) & (norms > 0)
    if not directed.all():
        wide, norms = wide[directed], norms[directed]
    wide /= norms[:, None]
    return wide, directed
