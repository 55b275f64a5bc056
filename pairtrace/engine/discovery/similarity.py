"""Cosines of a bag of prompts with every pair of a store, as a matrix on disk that no process ever holds.

Letters: P items of the bag, N pairs of the store, D width, S pairs per shard.

One Dask task per shard of the store computes S columns, writes them to a chunked Zarr array and marks them done; a run
that is killed goes on with the columns that have no mark. Back travels the task's share of the Gram matrix of the rows,
all that is needed to reduce them exactly: with M = U S V', M M' = U S^2 U', and the rows are U S in the axes V.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.dask_cluster import one_thread
from pairtrace.engine.discovery.chunk_tasks import sum_chunks
from pairtrace.engine.journal import require_same_run
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.errors import ConfigError
from pairtrace.kernels.cosine import cosine_blocks, prepare_directions
from pairtrace.store.dask_view import store_identity
from pairtrace.store.reader import ActivationStore

SCHEMA_VERSION = 1
COSINE, MARKS = "cosine", "marks"
_ATTRIBUTE = "pairtrace"
# Rows of a chunk of the matrix: with the columns of a shard, some 16 MB.
_CHUNK_ITEMS = 1024
# Columns that are made float64 at a time.
_GRAM_COLUMNS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """A finished matrix of cosines.

    Attributes:
        path: of the Zarr group with `cosine` (float16 [P, N], NaN where a pair has no direction or no row yet) and
            `marks` (int32 per shard: 0 to do, else 1 + the number of its pairs that have a cosine).
        gram: float64 [P, P], `sum_j c_ij c_kj` over the pairs with a cosine.
        columns: number of these pairs.
    """

    path: str
    gram: np.ndarray
    columns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """What every task needs: the matrix, the directions float32 [P, D] and S."""

    path: str
    directions: np.ndarray
    shard_rows: int


def similarity_matrix(
    path: str | Path,
    directions: np.ndarray,
    bag: str,
    store: ActivationStore,
    layer: int,
    client: Any,
    progress: Progress = NULL_PROGRESS,
) -> Similarity:
    """Write the cosines of all items with all pairs, or those that an interrupted run has left to do.

    The cosines are rounded to float16 (an error of at most 2.5e-4); the Gram matrix is that of the rounded cosines, so
    that it has the same bits whichever run wrote them. It is P x P float64 (200 MB for 5,000 items) in every task at
    work, and travels between workers, which add it up.

    Args:
        path: of the Zarr group, which every worker must see.
        directions: float32 [P, D], finite, no row zero.
        bag: fingerprint of what the directions are.
        store: complete, or opened with `allow_incomplete`; pairs that are missing have no cosine.
        layer: of the store.
        client: a `distributed.Client`.
        progress: counts pairs.

    Raises:
        DataMismatchError: there is a matrix of another bag, store or layer.
        ConfigError: the group cannot be written, or the cluster fails.
        StoreError: a worker cannot open the store, or it is damaged.
        DirectionError: a direction is zero or not finite, or has another width.
    """
    prepare_directions(directions)  # what no task could use is refused before there is a matrix
    manifest = store.manifest
    expected = {
        "schema_version": SCHEMA_VERSION,
        "store": store_identity(manifest),
        "array": f"diff/{layer}",
        "bag": bag,
        "items": len(directions),
        "pairs": store.rows,
    }
    place = Path(path).absolute()
    _prepare(place, expected, manifest.shard_rows)
    work = _Work(path=str(place), directions=directions, shard_rows=manifest.shard_rows)
    progress.start("similarity", store.rows, "pairs")
    gram, columns = sum_chunks(store.dask(layer), _columns, work, client, progress)
    progress.finish()
    return Similarity(path=str(place), gram=gram, columns=int(columns))


def _prepare(path: Path, expected: dict[str, Any], shard_rows: int) -> None:
    import zarr

    try:
        group: Any = zarr.open_group(path, mode="a")
        if _ATTRIBUTE in group.attrs:
            require_same_run(expected, group.attrs[_ATTRIBUTE], path, exact=False)
            return
        items, pairs = expected["items"], expected["pairs"]
        group.create_array(
            COSINE,
            shape=(items, pairs),
            chunks=(min(items, _CHUNK_ITEMS), shard_rows),
            dtype="float16",
            fill_value=float("nan"),
            compressors=None,
            overwrite=True,
        )
        group.create_array(
            MARKS, shape=(-(-pairs // shard_rows),), chunks=(1,), dtype="int32", compressors=None, overwrite=True
        )
        # Last: where it is, the arrays are there.
        group.attrs[_ATTRIBUTE] = expected
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; check the free space and permissions") from error


# On the workers


def _columns(rows: np.ndarray, given: _Work, block_id: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Write the columns of one shard, unless they are there; their Gram matrix, and how many have a cosine."""
    import zarr

    with one_thread():
        group: Any = zarr.open_group(given.path, mode="r+")
        matrix, marks = group[COSINE], group[MARKS]
        shard = block_id[0]
        span = slice(shard * given.shard_rows, shard * given.shard_rows + len(rows))
        mark = int(marks[shard])
        cosines = np.asarray(matrix[:, span]) if mark else np.empty(0)
        # A mark without its columns, as a damaged disk leaves it, counts for nothing.
        if not mark or _complete(cosines) != mark - 1:
            cosines = np.empty((len(given.directions), len(rows)), np.float16)
            for start, block in cosine_blocks(rows, given.directions):
                cosines[:, start : start + len(block)] = block.T
            matrix[:, span] = cosines
            if count := _complete(cosines):
                marks[shard] = 1 + count
        return _gram(cosines), _complete(cosines)


def _complete(cosines: np.ndarray) -> int:
    """Columns with all their cosines."""
    return int(np.isfinite(cosines).all(axis=0).sum())


def _gram(cosines: np.ndarray) -> np.ndarray:
    """float64 [P, P] over the columns that have cosines, added up in a fixed order."""
    total = np.zeros((len(cosines), len(cosines)))
    for start in range(0, cosines.shape[1], _GRAM_COLUMNS):
        part = np.nan_to_num(cosines[:, start : start + _GRAM_COLUMNS].astype(np.float64))
        total += part @ part.T
    return total
