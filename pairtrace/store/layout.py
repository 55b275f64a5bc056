"""The layout of a store on disk: array names, types, chunks, codecs, and the creation of an empty one.

Legend: N rows (pairs), D width, S rows per shard, L layers.

Every array is chunked by shard along its rows, so one shard is one chunk of each array. The only codec after
the little-endian bytes (or vlen-utf8 for the two string arrays) is crc32c: a numeric chunk file is S raw rows
followed by four bytes, and can be memory-mapped. `write_empty_chunks` is on: a chunk that exists is a chunk
that was computed, also when it holds only zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pairtrace.store.manifest import Manifest

if TYPE_CHECKING:
    import zarr

MISSING, OK, QUARANTINED = 0, 1, 2
PAIR_ID_BYTES = 16
CHECKSUM_BYTES = 4
GROUPS = ("diff", "norm", "chosen", "rejected")
ROW_ARRAYS = ("diff", "chosen", "rejected")

_ELEMENT = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a store.

    Attributes:
        name: path inside the group, for example "diff/20".
        dtype: zarr name of the element type; "string" for variable-length text.
        rows: N.
        shard_rows: S.
        row_shape: shape of one row: (), (3,), (16,) or (D,).
    """

    name: str
    dtype: str
    rows: int
    shard_rows: int
    row_shape: tuple[int, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the elements are strings."""
        return self.dtype == "string"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Element type of a numeric array, little-endian."""
        assert not self.is_text
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a numeric array."""
        return self.numpy_dtype.itemsize * math.prod(self.row_shape)

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file of a numeric array: S rows, also for the last shard, and the checksum."""
        return self.shard_rows * self.row_bytes + CHECKSUM_BYTES

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row after its last."""
        assert 0 <= shard < self.shards, f"shard {shard} of {self.shards}"
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def key(self, shard: int) -> str:
        """Path of the chunk of `shard` inside the group."""
        return "/".join([self.name, "c", str(shard), *("0" for _ in self.row_shape)])

    def metadata(self) -> dict[str, Any]:
        """The part of the array's `zarr.json` that a reader of raw chunks relies on."""
        if self.is_text:
            serializer: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
        elif self.numpy_dtype.itemsize == 1:
            serializer = {"name": "bytes"}
        else:
            serializer = {"name": "bytes", "configuration": {"endian": "little"}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.rows, *self.row_shape],
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [serializer, {"name": "crc32c"}],
        }


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of the store, by name, `status` last."""

    def spec(name: str, dtype: str, *row_shape: int) -> ArraySpec:
        return ArraySpec(
            name=name, dtype=dtype, rows=manifest.rows, shard_rows=manifest.shard_rows, row_shape=row_shape
        )

    def all_specs() -> Iterator[ArraySpec]:
        yield spec("pair_id", "uint8", PAIR_ID_BYTES)
        yield spec("tokens", "int32", 3)
        yield spec("source", "string")
        yield spec("reason", "string")
        for layer in manifest.layers:
            yield spec(f"diff/{layer}", _ELEMENT[manifest.dtype], manifest.width)
            yield spec(f"norm/{layer}", "float32")
            if manifest.sides:
                yield spec(f"chosen/{layer}", _ELEMENT[manifest.dtype], manifest.width)
                yield spec(f"rejected/{layer}", _ELEMENT[manifest.dtype], manifest.width)
        yield spec("status", "uint8")

    return {one.name: one for one in all_specs()}


def create_arrays(group: zarr.Group, manifest: Manifest) -> None:
    """Create every array of an empty store, without a single chunk."""
    from zarr.codecs import BytesCodec, Crc32cCodec

    for spec in array_specs(manifest).values():
        group.create_array(
            spec.name,
            shape=(spec.rows, *spec.row_shape),
            chunks=(spec.shard_rows, *spec.row_shape),
            dtype=str if spec.is_text else spec.dtype,
            serializer="auto" if spec.is_text else BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value="" if spec.is_text else 0,
            config={"write_empty_chunks": True},
        )


# For each element type: unsigned integer of the same width, its bits without the sign, the bits of infinity.
_BITS: dict[str, tuple[str, int, int]] = {
    "float16": ("u2", 0x7FFF, 0x7C00),
    "bfloat16": ("u2", 0x7FFF, 0x7F80),
    "float32": ("u4", 0x7FFFFFFF, 0x7F800000),
}


def nonfinite_rows(values: np.ndarray, dtype: str) -> npt.NDArray[np.bool_]:
    """Which rows hold a NaN or an infinity.

    Args:
        values: [n, D] in the type of the store (bfloat16 as uint16).
        dtype: the store's `dtype`.

    Returns:
        bool [n].
    """
    # Without its sign, such a number's bits are at least those of infinity: one integer maximum per row,
    # where isfinite would convert every half float.
    kind, magnitude, infinity = _BITS[dtype]
    found: npt.NDArray[np.bool_] = (values.view(kind) & magnitude).max(axis=1) >= infinity
    return found
