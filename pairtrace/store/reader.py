"""Reading an activation store.

Legend: N rows (pairs), D width, S rows per shard.

On a local path rows that are not compressed are mapped, not copied, and the disk is asked for the next shards while one
is worked on; other shards are fetched and decoded ahead in threads. The length of a chunk is checked before any of its
rows is handed out; its checksum is compared the first time `blocks` reaches it (and `take`, where it is asked to).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from pairtrace.errors import ConfigError, LayerError, StoreIncompleteError
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.advice import resume_advice
from pairtrace.store.chunks import UncheckedChunk, read_chunk, read_strings
from pairtrace.store.dask_view import dask_rows
from pairtrace.store.layout import MISSING, OK, QUARANTINED, ROW_ARRAYS, ArraySpec, array_specs
from pairtrace.store.location import LocalLocation, Location, StorePath, open_location
from pairtrace.store.lock import LOCK_KEY
from pairtrace.store.manifest import Manifest
from pairtrace.store.metadata import require_manifest
from pairtrace.store.read_ahead import ahead, asked_ahead
from pairtrace.store.rows import RowReader, read_status

if TYPE_CHECKING:
    import dask.array

Chunk = TypeVar("Chunk")

# Requests for small objects that an object store answers at the same time.
_REMOTE_REQUESTS = 16


class StoreSummary(TypedDict):
    """Counts of rows, bytes on disk, and quarantined rows by reason code."""

    rows: int
    ok: int
    quarantined: int
    missing: int
    bytes: int
    reasons: dict[str, int]


class ActivationStore:
    """One activation store, opened for reading; made by `open`.

    What is finished is decided when the store is opened: shards that a writer finishes later are not seen.

    Attributes:
        path: path or address of the store.
        manifest: what the store was made from.
    """

    def __init__(self, location: Location, manifest: Manifest, status: npt.NDArray[np.uint8]) -> None:
        self.path = location.name
        self.manifest = manifest
        self._location = location
        self._specs = array_specs(manifest)
        self._status = status
        self._reader = RowReader(location, manifest)

    @classmethod
    def open(cls, path: StorePath, *, allow_incomplete: bool = False) -> ActivationStore:
        """Open a store.

        Args:
            path: directory, or address of an object store.
            allow_incomplete: accept a store with missing rows; `status` tells which.

        Raises:
            StoreError: there is no pairtrace store at `path`.
            StoreSchemaError: the store has another schema version.
            StoreDamagedError: the manifest, an array's description or a mark is damaged.
            StoreIncompleteError: rows are missing and `allow_incomplete` is False.
        """
        location = open_location(path)
        manifest = require_manifest(location)
        status = read_status(location, array_specs(manifest)["status"])
        store = cls(location, manifest, status)
        if not allow_incomplete and (missing := int(np.count_nonzero(status == MISSING))):
            raise StoreIncompleteError(
                f"{store.path} is incomplete: {missing} of {manifest.rows} rows are missing. {store.resume_advice()}"
            )
        return store

    @property
    def address(self) -> str:
        """Absolute path or address, under which another process finds the store."""
        return str(self._location.root.absolute()) if isinstance(self._location, LocalLocation) else self.path

    @property
    def rows(self) -> int:
        """N, rows of the data set."""
        return self.manifest.rows

    @property
    def width(self) -> int:
        """D, width of the residual stream."""
        return self.manifest.width

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers in the store."""
        return self.manifest.layers

    def resume_advice(self) -> str:
        """What to type to compute the missing rows."""
        return resume_advice(self.manifest, self.path)

    def row_reader(self) -> RowReader:
        """Access to the rows of every array by number; one object, so a checksum is compared only once."""
        return self._reader

    def status(self) -> npt.NDArray[np.uint8]:
        """uint8 [N]: 0 missing, 1 ok, 2 quarantined (read-only)."""
        view = self._status.view()
        view.flags.writeable = False
        return view

    def summary(self) -> StoreSummary:
        """Counts: rows, ok, quarantined, missing, bytes on disk, and quarantined rows by reason code."""
        counts = np.bincount(self._status, minlength=3)
        quarantined = self._status == QUARANTINED
        codes = Counter(text.split(":", 1)[0] for text in self.reasons()[quarantined])
        return {
            "rows": self.rows,
            "ok": int(counts[OK]),
            "quarantined": int(counts[QUARANTINED]),
            "missing": int(counts[MISSING]),
            "bytes": sum(self._location.size(key) or 0 for key in self._location.list_keys() if key != LOCK_KEY),
            "reasons": dict(codes.most_common()),
        }

    def pair_ids(self) -> npt.NDArray[np.uint8]:
        """uint8 [N, 16]; zeros for missing rows."""
        return self._gather("pair_id", 0)

    def tokens(self) -> npt.NDArray[np.int32]:
        """int32 [N, 3], counts of prompt, chosen and rejected tokens; zeros for missing rows."""
        return self._gather("tokens", 0)

    def sources(self) -> np.ndarray:
        """Object [N] of strings; "" for missing rows."""
        return self._gather("source", "")

    def source_strings(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """The sources without a Python object for each, "" for missing rows.

        Returns:
            offsets int64 [N + 1] and UTF-8 bytes: source i is `data[offsets[i] : offsets[i + 1]]`.
        """
        spec = self._specs["source"]
        lengths, pieces = np.zeros(spec.rows, np.int64), [np.empty(0, np.uint8)]
        for shard, (offsets, data) in self._small_chunks(spec, read_strings):
            start, stop = spec.span(shard)
            lengths[start:stop] = np.diff(offsets)
            pieces.append(data)
        return np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(pieces)

    def reasons(self) -> np.ndarray:
        """Object [N] of strings; "" for rows that are not quarantined."""
        return self._gather("reason", "")

    def norms(self, layer: int) -> npt.NDArray[np.float32]:
        """float32 [N], norm of the difference before it was rounded; 0 for quarantined, NaN for missing rows.

        Raises:
            LayerError: the layer is not in the store.
            StoreDamagedError: a chunk is damaged.
        """
        self._check_layer(layer)
        return self._gather(f"norm/{layer}", np.nan)

    def blocks(
        self,
        layer: int,
        array: str = "diff",
        block_rows: int | None = None,
        *,
        checksum: bool = True,
        read_ahead: int = 2,
    ) -> Iterator[tuple[int, np.ndarray | ScaledRows]]:
        """Go through the rows of one layer in order, shard by shard.

        Quarantined rows are part of the blocks and hold zeros; missing shards (of an incomplete store) are
        left out, so rows must be counted from each block's start row. A block keeps its file mapped as long
        as it is alive.

        Args:
            layer: a layer of the store.
            array: "diff", or "chosen" or "rejected" in a store with sides.
            block_rows: largest number of rows in a block; None for whole shards.
            checksum: compare the checksum of a shard when this object reads it for the first time; that of a
                compressed shard is always compared.
            read_ahead: shards to read ahead. Of a store that is compressed or not on a local path, so many are in
                memory besides the one handed out, and so many threads fetch and decode them.

        Yields:
            first row, and rows [n, D] in the type of the store (bfloat16 as uint16; int8 with its scales): a
            read-only, contiguous view of the file on a local path, unless compressed.

        Raises:
            LayerError: the layer is not in the store.
            ConfigError: the array is not in the store.
            StoreDamagedError: a chunk is missing, truncated, or differs from its checksum; raised when the iterator
                reaches it, whatever was read ahead.
        """
        spec = self._row_spec(layer, array)
        step = spec.shard_rows if block_rows is None else block_rows
        if step < 1:
            raise ConfigError(f"block_rows must be at least 1, not {block_rows}")
        if read_ahead < 0:
            raise ConfigError(f"read_ahead must not be negative, but is {read_ahead}")
        return self._iterate(spec, step, checksum, read_ahead)

    def blocks_to_check(
        self, layer: int, array: str = "diff", *, read_ahead: int = 2
    ) -> Iterator[tuple[int, np.ndarray | ScaledRows, UncheckedChunk | None]]:
        """As `blocks`, by whole shards, but the checksum of mapped rows is left to the caller, who reads them anyway.

        Yields:
            first row, rows as in `blocks`, and what to compare before anything made of the rows is used; None where
            nothing is left to compare.

        Raises:
            LayerError, ConfigError, StoreDamagedError: as for `blocks`, but for that checksum.
        """
        spec = self._row_spec(layer, array)
        if spec.codec is not None or not isinstance(self._location, LocalLocation):
            for start, rows in self.blocks(layer, array, read_ahead=read_ahead):
                yield start, rows, None
            return
        with closing(self._mapped_shards(spec, self._location, read_ahead)) as shards:
            for shard in shards:
                yield spec.span(shard)[0], *self._reader.vectors_to_check(spec.name, shard)

    def prefetch(self, arrays: Sequence[str]) -> None:
        """Ask the disk for all finished chunks of some arrays, and come back before they are here; local stores only.

        Args:
            arrays: their names, for example "pair_id".
        """
        if isinstance(self._location, LocalLocation):
            for name in arrays:
                for shard in self.finished_shards():
                    self._location.prefetch(self._specs[name].key(shard))

    def take(
        self, layer: int, rows: Sequence[int] | np.ndarray, array: str = "diff", *, checksum: bool = False
    ) -> np.ndarray:
        """Copy any rows, in the order asked for.

        Args:
            layer: a layer of the store.
            rows: int [n], each in [0, N); repeats are allowed.
            array: "diff", or "chosen" or "rejected" in a store with sides.
            checksum: compare the checksum of a shard when this object reads it for the first time, which
                reads all of it; otherwise only the pages of these rows are read on a local path.

        Returns:
            [n, D] in the type of the store (bfloat16 as uint16).

        Raises:
            LayerError: the layer is not in the store.
            ConfigError: the array is not in the store, or a row is outside it.
            StoreIncompleteError: a row is missing.
            StoreDamagedError: a chunk is missing, has the wrong length, or (if compared) the wrong checksum.
        """
        spec = self._row_spec(layer, array)
        asked = np.asarray(rows)
        if asked.ndim != 1 or (asked.size and asked.dtype.kind not in "iu"):
            raise ConfigError(f"rows must be a list of row numbers, not {asked.dtype} {list(asked.shape)}")
        wanted = asked.astype(np.int64)
        outside = wanted[(wanted < 0) | (wanted >= self.rows)]
        if outside.size:
            raise ConfigError(f"row {outside[0]} is outside the store, which has rows 0 to {self.rows - 1}")
        missing = wanted[self._status[wanted] == MISSING]
        if missing.size:
            raise StoreIncompleteError(
                f"{self.path}: {missing.size} of the rows asked for are missing, the first is row {missing[0]}. "
                f"{self.resume_advice()}"
            )
        return self._reader.take(spec.name, wanted, checksum=checksum)

    def dask(self, layer: int, array: str = "diff", *, checksum: bool = True) -> dask.array.Array:
        """The rows of one layer as a Dask array, one chunk per shard.

        A task opens its shard by the store's path, which every worker must see.

        Args:
            layer: a layer of the store.
            array: "diff", or "chosen" or "rejected" in a store with sides.
            checksum: compare the checksum of a shard when a worker reads it for the first time.

        Returns:
            [N, D] in chunks of [S, D], the last one shorter; float16 for a float16 store, otherwise float32 (Dask
            has no bfloat16, and int8 rows are decoded). Rows that a store opened with `allow_incomplete` lacks
            are NaN, those of quarantined pairs zero.

        Raises:
            LayerError: the layer is not in the store.
            ConfigError: the array is not in the store.
            MissingDependencyError: Dask is not installed.
            StoreDamagedError: when a chunk is computed that is missing, truncated, or differs from its checksum.
        """
        spec = self._row_spec(layer, array)
        missing = sorted(set(range(spec.shards)) - set(self.finished_shards()))
        return dask_rows(self.address, self.manifest, spec.name, tuple(missing), checksum=checksum)

    def _iterate(
        self, spec: ArraySpec, step: int, checksum: bool, read_ahead: int
    ) -> Iterator[tuple[int, np.ndarray | ScaledRows]]:
        with closing(self._shards(spec, checksum, read_ahead)) as shards:
            for shard, rows in shards:
                start = spec.span(shard)[0]
                for offset in range(0, len(rows), step):
                    yield start + offset, rows[offset : offset + step]
                del rows  # the next shard is loaded while this generator would keep it alive

    def _shards(
        self, spec: ArraySpec, checksum: bool, read_ahead: int
    ) -> Generator[tuple[int, np.ndarray | ScaledRows]]:
        def load(shard: int) -> np.ndarray | ScaledRows:
            return self._reader.vectors(spec.name, shard, checksum=checksum)

        location = self._location
        if spec.codec is not None or not isinstance(location, LocalLocation):
            yield from ahead(self.finished_shards(), load, count=read_ahead, threads=read_ahead)
            return
        with closing(self._mapped_shards(spec, location, read_ahead)) as present:
            for shard in present:
                # The checksum is compared here, not ahead: what it has read is still in the processor's cache when the
                # consumer reads it.
                yield shard, load(shard)

    def _mapped_shards(self, spec: ArraySpec, location: LocalLocation, read_ahead: int) -> Generator[int]:
        """Finished shards of an array in order, the next ones asked of the disk."""
        keys = {spec.key(shard): shard for shard in self.finished_shards()}
        with closing(asked_ahead(list(keys), location.is_cached, location.prefetch, count=read_ahead)) as present:
            for key in present:
                yield keys[key]

    def finished_shards(self) -> list[int]:
        """Numbers of the shards that were marked when the store was opened, ascending."""
        spec = self._specs["status"]
        return np.flatnonzero(self._status[:: spec.shard_rows] != MISSING).tolist()

    def _gather(self, name: str, fill: float | str) -> np.ndarray:
        """A whole small array, checksums compared, `fill` where shards are missing."""
        spec = self._specs[name]
        shape = (spec.rows, *spec.row_shape)
        result = np.full(shape, fill, dtype=object if spec.is_text else spec.numpy_dtype)
        for shard, values in self._small_chunks(spec, read_chunk):
            start, stop = spec.span(shard)
            result[start:stop] = values
        return result

    def _small_chunks(
        self, spec: ArraySpec, read: Callable[[Location, ArraySpec, int], Chunk]
    ) -> Iterator[tuple[int, Chunk]]:
        """The chunks of a small array in order; those of an object store are waited for side by side."""
        count = 0 if isinstance(self._location, LocalLocation) else _REMOTE_REQUESTS
        return ahead(
            self.finished_shards(),
            lambda shard: read(self._location, spec, shard),
            count=count,
            threads=_REMOTE_REQUESTS,
        )

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise LayerError(
                f"layer {layer} is not in {self.path}, which holds layers {', '.join(map(str, self.layers))}; "
                "choose one of them, or extract the layer into another store"
            )

    def _row_spec(self, layer: int, array: str) -> ArraySpec:
        self._check_layer(layer)
        if array not in ROW_ARRAYS:
            raise ConfigError(f"array must be one of {', '.join(ROW_ARRAYS)}, not {array!r}")
        if f"{array}/{layer}" not in self._specs:
            raise ConfigError(f"{self.path} holds no {array!r} array; extract again with --sides")
        return self._specs[f"{array}/{layer}"]
