"""Ways to keep rows in files: the activation store, plain memory maps, and other formats.

Every way writes the same rows in shards (chunks of that size where there are chunks) and forces its files to the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from activations import DISTINCT_ROWS, LAYER, SHARD_ROWS, distinct_rows, make_manifest, shard_blocks
from harness import optional
from plain_read import files_below

from pairtrace.store.location import fsync_path
from pairtrace.store.manifest import Manifest
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import ShardBlock, StoreWriter

MEMMAP = "np.memmap"


class Way:
    """One way to keep N rows; `parts` are the rows of every shard."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self.rows, self.width = sum(map(len, parts)), parts[0].shape[1]

    def write(self, folder: Path) -> None:
        """Write all rows durably below a folder that does not exist yet."""
        raise NotImplementedError

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        """Open what was written, and give all rows."""
        raise NotImplementedError

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        """Open what was written; the function copies any rows, in the order of their numbers given."""
        raise NotImplementedError


class Memmap(Way):
    """One file, mapped."""

    def write(self, folder: Path) -> None:
        folder.mkdir()
        path = folder / "rows.npy"
        target = np.lib.format.open_memmap(path, "w+", np.float16, (self.rows, self.width))
        for start, part in starts(self.parts):
            target[start : start + len(part)] = part
        target.flush()
        fsync_path(path)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        mapped = np.load(folder / "rows.npy", mmap_mode="r")
        for start, part in starts(self.parts):
            yield mapped[start : start + len(part)]

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        mapped = np.load(folder / "rows.npy", mmap_mode="r")
        return lambda rows: mapped[rows]


class Store(Way):
    """An activation store."""

    def __init__(self, parts: list[np.ndarray], blocks: list[ShardBlock], manifest: Manifest, fsync: bool) -> None:
        super().__init__(parts)
        self._blocks, self._manifest, self._fsync = blocks, manifest, fsync

    def write(self, folder: Path) -> None:
        with StoreWriter.create_or_resume(folder, self._manifest, fsync=self._fsync) as writer:
            for block in self._blocks:
                writer.write_shard(block)

    def read(self, folder: Path, *, checksum: bool = True) -> Iterator[np.ndarray]:
        for _, rows in ActivationStore.open(folder).blocks(LAYER, checksum=checksum):
            yield rows if isinstance(rows, np.ndarray) else rows.values

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        store = ActivationStore.open(folder)
        return lambda rows: store.take(LAYER, rows)


class Safetensors(Way):
    """One file per shard."""

    def write(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir()
        for number, part in enumerate(self.parts):
            save_file({"diff": part}, folder / f"{number}.safetensors")
        fsync_below(folder)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        from safetensors.numpy import load_file

        for number in range(len(self.parts)):
            yield load_file(folder / f"{number}.safetensors")["diff"]

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        from safetensors import safe_open

        files = [safe_open(folder / f"{number}.safetensors", "np") for number in range(len(self.parts))]
        slices = [file.get_slice("diff") for file in files]
        size = len(self.parts[0])
        return lambda rows: np.concatenate([slices[row // size][row % size : row % size + 1] for row in rows.tolist()])


class Hdf5(Way):
    """One file in chunks."""

    def write(self, folder: Path) -> None:
        import h5py

        folder.mkdir()
        path = folder / "rows.h5"
        with h5py.File(path, "w") as file:
            shape, chunks = (self.rows, self.width), self.parts[0].shape
            target = file.create_dataset("diff", shape, np.float16, chunks=chunks)
            for start, part in starts(self.parts):
                target[start : start + len(part)] = part
        fsync_path(path)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        import h5py

        with h5py.File(folder / "rows.h5") as file:
            for start, part in starts(self.parts):
                yield file["diff"][start : start + len(part)]

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        import h5py

        rows_of_file = h5py.File(folder / "rows.h5")["diff"]

        def take(rows: np.ndarray) -> np.ndarray:
            ascending, places = np.unique(rows, return_inverse=True)
            found: np.ndarray = rows_of_file[ascending][places]
            return found

        return take


class PlainZarr(Way):
    """A Zarr array written and read by zarr itself."""

    def __init__(self, parts: list[np.ndarray], **codecs: Any) -> None:
        super().__init__(parts)
        self._codecs = codecs

    def write(self, folder: Path) -> None:
        target = zarr.create_array(
            folder, shape=(self.rows, self.width), chunks=self.parts[0].shape, dtype="float16", **self._codecs
        )
        for start, part in starts(self.parts):
            target[start : start + len(part)] = part
        fsync_below(folder)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        source = zarr.open_array(folder, mode="r")
        for start, part in starts(self.parts):
            yield np.asarray(source[start : start + len(part)])

    def taker(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        source = zarr.open_array(folder, mode="r")
        return lambda rows: np.asarray(source.oindex[rows])


def starts(parts: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """The first row of every shard, and its rows."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


def fsync_below(folder: Path) -> None:
    for path in files_below(folder):
        fsync_path(path)
    for path in {path.parent for path in files_below(folder)}:
        fsync_path(path)


def all_ways(rows: int, width: int, shard_rows: int) -> dict[str, Way]:
    distinct = distinct_rows(width, DISTINCT_ROWS // SHARD_ROWS * shard_rows)
    wide = distinct.astype(np.float32)

    def store(*, fsync: bool = True, **changes: Any) -> Store:
        manifest = make_manifest(rows, width, shard_rows=shard_rows, **changes)
        source = wide if manifest.dtype == "int8" else distinct
        blocks = list(shard_blocks(manifest, source, list(range(-(-rows // shard_rows)))))
        return Store([block.diff[LAYER] for block in blocks], blocks, manifest, fsync)

    plain = store()
    parts = plain.parts
    ways: dict[str, Way] = {
        MEMMAP: Memmap(parts),
        "pairtrace": plain,
        "pairtrace, not forced to disk": store(fsync=False),
        "pairtrace, zstd:3": store(codec="zstd:3"),
        "pairtrace, blosc-lz4:5": store(codec="blosc-lz4:5"),
        "pairtrace, int8": store(dtype="int8"),
        "safetensors per shard": Safetensors(parts),
        "zarr, crc32c": PlainZarr(parts, compressors=[zarr.codecs.Crc32cCodec()], filters=None),
        "zarr, its defaults": PlainZarr(parts),
    }
    return {**ways, "HDF5": Hdf5(parts)} if optional("h5py") else ways
