"""Any rows of any array of a store, straight from its chunks as they are at this moment.

Legend: D width, S rows per shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.chunks import UncheckedChunk, damaged, find_chunk, open_chunk, read_chunk, wrong_size
from pairtrace.store.layout import OK, QUARANTINED, ArraySpec, array_specs, is_scaled, scale_names, to_float32
from pairtrace.store.location import LocalLocation, Location, StorePath, open_location
from pairtrace.store.manifest import Manifest
from pairtrace.store.metadata import require_manifest

# Bytes from which copying a row out of the file is quicker than mapping the file, a page fault each.
_WIDE_ROW = 2048


class RowReader:
    """Reads rows of a store that may still be growing; only the chunks concerned are looked at.

    Unlike `ActivationStore`, it keeps no record of what was finished when it was opened: the mark of a shard
    is read when one of its rows is asked for. Of checksums it remembers which ones it has compared, so a
    chunk that was read with its checksum once must not be written again.

    Attributes:
        manifest: what the store was made from.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.manifest = manifest
        self._location = location
        self._specs = array_specs(manifest)
        self._checked: set[tuple[str, int]] = set()

    @classmethod
    def open(cls, path: StorePath) -> RowReader:
        """Open a store, complete or not.

        Raises:
            StoreError: there is no pairtrace store at `path`.
            StoreSchemaError: the store has another schema version.
            StoreDamagedError: the manifest or an array's description is damaged.
        """
        location = open_location(path)
        return cls(location, require_manifest(location))

    def chunk(self, name: str, shard: int, *, checksum: bool = True) -> np.ndarray:
        """All rows of one shard of one array; a read-only view of the file on a local path, unless compressed.

        Args:
            name: name of the array, for example "diff/20".
            shard: number of the shard.
            checksum: compare the checksum when this object reads the chunk for the first time; that of a compressed
                chunk is always compared.

        Raises:
            StoreDamagedError: the chunk is missing, has the wrong length, or (if compared) the wrong checksum.
        """
        first = checksum and (name, shard) not in self._checked
        rows = read_chunk(self._location, self._specs[name], shard, checksum=first)
        if first:
            self._checked.add((name, shard))
        return rows

    def vectors(self, name: str, shard: int, *, checksum: bool = True) -> np.ndarray | ScaledRows:
        """All rows of one shard of diff, chosen or rejected, with their scales in an int8 store.

        Args:
            name: name of the array, for example "diff/20".
            shard: number of the shard.
            checksum: as for `chunk`.

        Returns:
            [n, D], n <= S, in the type of the store (bfloat16 as uint16), or `ScaledRows` for int8.

        Raises:
            StoreDamagedError: a chunk is missing, has the wrong length, or (if compared) the wrong checksum.
        """
        values = self.chunk(name, shard, checksum=checksum)
        if not is_scaled(name, self._specs):
            return values
        row_scale, column_scale = (self.chunk(scale, shard, checksum=checksum) for scale in scale_names(name))
        return ScaledRows(values, row_scale, column_scale[0])

    def vectors_to_check(self, name: str, shard: int) -> tuple[np.ndarray | ScaledRows, UncheckedChunk | None]:
        """As `vectors`, but the checksum of uncompressed rows is left to the caller, who reads them anyway.

        Returns:
            rows, and what to compare; None where nothing is left to compare.

        Raises:
            StoreDamagedError: as for `vectors`, but for that checksum.
        """
        if self._specs[name].codec is not None or (name, shard) in self._checked:
            return self.vectors(name, shard), None
        chunk = open_chunk(self._location, self._specs[name], shard)
        if not is_scaled(name, self._specs):
            return chunk.rows, chunk
        row_scale, column_scale = (self.chunk(scale, shard) for scale in scale_names(name))
        return ScaledRows(chunk.rows, row_scale, column_scale[0]), chunk

    def take(self, name: str, rows: Sequence[int] | npt.NDArray[np.int64], *, checksum: bool = True) -> np.ndarray:
        """Copy rows of one array, in the order asked for.

        Args:
            name: name of the array, for example "norm/20".
            rows: int64 [n], each in [0, N); repeats are allowed.
            checksum: compare the checksum of each chunk that this object has not compared before.

        Returns:
            [n, ...] in the type of the array; strings as objects; int8 rows decoded to float32.

        Raises:
            StoreDamagedError: a chunk is missing, has the wrong length, or (if compared) the wrong checksum.
        """
        spec = self._specs[name]
        wanted = np.asarray(rows, dtype=np.int64)
        scaled = is_scaled(name, self._specs)
        dtype = object if spec.is_text else np.float32 if scaled else spec.numpy_dtype
        result = np.empty((wanted.size, *spec.row_shape), dtype)
        shard_of = wanted // spec.shard_rows
        order = np.argsort(shard_of, kind="stable")
        shards, starts = np.unique(shard_of[order], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, starts[1:]), strict=False):
            inside = wanted[places] - shard * spec.shard_rows
            found = self._some_rows(name, shard, inside, checksum=checksum)
            if scaled:
                row_scale, column_scale = (self.chunk(scale, shard, checksum=checksum) for scale in scale_names(name))
                result[places] = to_float32(ScaledRows(found, row_scale[inside], column_scale[0]))
            else:
                result[places] = found
        return result

    def _some_rows(self, name: str, shard: int, inside: npt.NDArray[np.int64], *, checksum: bool) -> np.ndarray:
        """Rows of one shard by their numbers in it, copied."""
        spec, location = self._specs[name], self._location
        to_compare = checksum and (name, shard) not in self._checked
        copied = isinstance(location, LocalLocation) and spec.chunk_bytes is not None and not to_compare
        if not copied or spec.row_bytes < _WIDE_ROW:
            return self.chunk(name, shard, checksum=checksum)[inside]
        assert isinstance(location, LocalLocation) and spec.chunk_bytes is not None
        rows = np.empty((inside.size, *spec.row_shape), spec.numpy_dtype)
        target, width = rows.view(np.uint8).reshape(-1).data, spec.row_bytes
        parts = ((row * width, target[i * width : (i + 1) * width]) for i, row in enumerate(inside.tolist()))
        size = location.copy_parts(spec.key(shard), spec.chunk_bytes, parts)
        if size != spec.chunk_bytes:
            raise damaged(location, spec, shard, "its chunk is missing" if size is None else wrong_size(size, spec))
        return rows

    def status(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """uint8 [n]: 1 ok or 2 quarantined, from the marks as they are now.

        Raises:
            StoreDamagedError: a shard has no mark, or a damaged one.
        """
        spec = self._specs["status"]
        values = self.take("status", rows)
        for shard in np.unique(np.asarray(rows, dtype=np.int64)[~_is_status(values)] // spec.shard_rows).tolist():
            raise damaged(self._location, spec, shard, _NO_STATUS)
        return values


def _read_mark(location: Location, spec: ArraySpec, shard: int) -> npt.NDArray[np.uint8] | None:
    """Status of the rows of one shard, uint8 [n], or None for a shard without a mark.

    Raises:
        StoreDamagedError: the mark is damaged, or holds something else than 1 and 2.
    """
    values = find_chunk(location, spec, shard)
    if values is not None and not _is_status(values).all():
        raise damaged(location, spec, shard, _NO_STATUS)
    return values


def read_status(location: Location, spec: ArraySpec) -> npt.NDArray[np.uint8]:
    """uint8 [N]; a shard without a mark stays 0.

    Raises:
        StoreDamagedError: a mark is damaged, or holds something else than 1 and 2.
    """
    status = np.zeros(spec.rows, np.uint8)
    for shard in range(spec.shards):
        values = _read_mark(location, spec, shard)
        if values is not None:
            start, stop = spec.span(shard)
            status[start:stop] = values
    return status


_NO_STATUS = "its mark holds rows without a status"


def _is_status(values: np.ndarray) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (values == OK) | (values == QUARANTINED)
    return found
