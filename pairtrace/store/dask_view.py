"""A store's rows as a Dask array whose chunks are the shards.

Legend: N rows, D width, S rows per shard.

A task carries the path, the name of the array and the number of the shard; the worker that runs it opens the chunk
where it is and, on a local path, maps it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pairtrace.errors import MissingDependencyError, StoreError
from pairtrace.store.layout import to_float32
from pairtrace.store.manifest import Manifest
from pairtrace.store.rows import RowReader

if TYPE_CHECKING:
    import dask.array


def store_identity(manifest: Manifest) -> str:
    """sha256 (hex) of a manifest: what a worker compares to know that it has opened the same store."""
    return hashlib.sha256(json.dumps(manifest.to_json(), sort_keys=True).encode()).hexdigest()


def open_same(path: str, identity: str) -> RowReader:
    """Open, on a worker, the store that is meant.

    Args:
        path: path or address of the store.
        identity: `store_identity` of the store that is meant.

    Raises:
        StoreError: there is no such store here, or it is another one.
    """
    reader = RowReader.open(path)
    if store_identity(reader.manifest) != identity:
        raise StoreError(f"{path} is another store here than where the work was begun; give a path that all can see")
    return reader


@lru_cache(maxsize=8)
def open_rows(path: str, identity: str) -> RowReader:
    """`open_same`, kept for the worker's next shards; for stores that do not change any more."""
    return open_same(path, identity)


def dask_rows(
    path: str, manifest: Manifest, array: str, missing: tuple[int, ...], *, checksum: bool
) -> dask.array.Array:
    """The array behind `ActivationStore.dask`.

    Args:
        path: absolute path or address, the same for every worker.
        manifest: of the store.
        array: name of the array, for example "diff/20".
        missing: numbers of the shards that have no rows yet; theirs are NaN.
        checksum: compare the checksum of every chunk that is read.

    Raises:
        MissingDependencyError: Dask is not installed.
    """
    try:
        import dask.array as da
    except ImportError as error:
        raise MissingDependencyError("dask", "discover", "the Dask view of a store") from error

    starts = range(0, manifest.rows, manifest.shard_rows)
    heights = tuple(min(manifest.shard_rows, manifest.rows - start) for start in starts)
    dtype = np.dtype(manifest.dtype if manifest.dtype in ("float16", "float32") else "float32")
    identity = store_identity(manifest)
    key = hashlib.sha256(json.dumps([path, identity, array, missing, checksum]).encode()).hexdigest()[:32]
    rows: dask.array.Array = da.map_blocks(
        _shard,
        chunks=(heights, (manifest.width,)),
        dtype=dtype,
        meta=np.empty((0, 0), dtype),
        name=f"pairtrace-{array.replace('/', '-')}-{key}",
        path=path,
        identity=identity,
        array=array,
        missing=missing,
        checksum=checksum,
    )
    return rows


def _shard(
    path: str, identity: str, array: str, missing: tuple[int, ...], checksum: bool, block_id: tuple[int, int]
) -> np.ndarray[Any, Any]:
    """One chunk: float16 or float32 [n, D], n <= S."""
    shard = block_id[0]
    reader = open_rows(path, identity)
    if shard in missing:
        manifest = reader.manifest
        height = min(manifest.shard_rows, manifest.rows - shard * manifest.shard_rows)
        dtype = np.float16 if manifest.dtype == "float16" else np.float32
        return np.full((height, manifest.width), np.nan, dtype)
    rows = reader.vectors(array, shard, checksum=checksum)
    if isinstance(rows, np.ndarray) and rows.dtype in (np.float16, np.float32):
        return rows
    return to_float32(rows)
