"""The layout of a store on disk: array names, types, chunks, codecs, and the creation of an empty one.

Legend: N rows (pairs), D width, S rows per shard, L layers.

Every array is chunked by shard along its rows, so one shard is one chunk of each array. The only codec after
the little-endian bytes (or vlen-utf8 for the two string arrays) is crc32c: a numeric chunk file is S raw rows
followed by four bytes, and can be memory-mapped. In a store with a codec the chunks of diff, chosen and rejected are
compressed before their checksum. `write_empty_chunks` is on: a chunk that exists is a chunk that was computed, also
when it holds only zeros.

An int8 store holds for each of these arrays, say diff/20, the scales row_scale/diff/20 (one number per row) and
column_scale/diff/20 (D numbers per shard, which depend on this shard's rows alone): a value is the int8 times the
scale of its row times the scale of its column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pairtrace.kernels.half import half_to_float32
from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.codecs import Codec, parse_codec
from pairtrace.store.manifest import Manifest

if TYPE_CHECKING:
    import zarr

MISSING, OK, QUARANTINED = 0, 1, 2
PAIR_ID_BYTES = 16
CHECKSUM_BYTES = 4
ROW_ARRAYS = ("diff", "chosen", "rejected")

_ELEMENT = {"float16": "float16", "float32": "float32", "bfloat16": "uint16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a store.

    Attributes:
        name: path inside the group, for example "diff/20".
        dtype: zarr name of the element type; "string" for variable-length text.
        rows: N; for the scales of columns the number of shards.
        shard_rows: S; for the scales of columns 1.
        row_shape: shape of one row: (), (3,), (16,) or (D,).
        codec: compressor of the chunks, or None.
        pairs: N, of which `shard_pairs` are in a shard: like `rows`, but also for the scales of columns.
        shard_pairs: S.
    """

    name: str
    dtype: str
    rows: int
    shard_rows: int
    row_shape: tuple[int, ...] = ()
    codec: Codec | None = None
    pairs: int
    shard_pairs: int

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
    def body_bytes(self) -> int:
        """Bytes of a numeric chunk before compression and checksum: S rows, also for the last shard."""
        return self.shard_rows * self.row_bytes

    @property
    def chunk_bytes(self) -> int | None:
        """Size of every chunk file, or None where it depends on the content: text and compressed chunks."""
        return None if self.is_text or self.codec is not None else self.body_bytes + CHECKSUM_BYTES

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard in this array and the row after its last."""
        assert 0 <= shard < self.shards, f"shard {shard} of {self.shards}"
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)

    def pair_span(self, shard: int) -> tuple[int, int]:
        """First row of a shard in the data set and the row after its last; for messages."""
        return shard * self.shard_pairs, min((shard + 1) * self.shard_pairs, self.pairs)

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
        compressor = [] if self.codec is None else [self.codec.metadata(self.numpy_dtype.itemsize)]
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
            "codecs": [serializer, *compressor, {"name": "crc32c"}],
        }


def scale_names(name: str) -> tuple[str, str]:
    """Names of the arrays with the scales of the rows and of the columns of an int8 array."""
    return f"row_scale/{name}", f"column_scale/{name}"


def is_scale(name: str) -> bool:
    """Whether an array holds scales of int8 rows."""
    return name.startswith(("row_scale/", "column_scale/"))


def is_scaled(name: str, specs: Mapping[str, ArraySpec]) -> bool:
    """Whether an array of the store `specs` holds int8 rows with scales."""
    return scale_names(name)[0] in specs


def array_specs(manifest: Manifest) -> dict[str, ArraySpec]:
    """Every array of the store, by name, `status` last."""
    codec = parse_codec(manifest.codec)
    shards = -(-manifest.rows // manifest.shard_rows)

    def spec(name: str, dtype: str, *row_shape: int, codec: Codec | None = None, per_shard: bool = False) -> ArraySpec:
        return ArraySpec(
            name=name,
            dtype=dtype,
            rows=shards if per_shard else manifest.rows,
            shard_rows=1 if per_shard else manifest.shard_rows,
            row_shape=row_shape,
            codec=codec,
            pairs=manifest.rows,
            shard_pairs=manifest.shard_rows,
        )

    def vectors(name: str) -> Iterator[ArraySpec]:
        yield spec(name, _ELEMENT[manifest.dtype], manifest.width, codec=codec)
        if manifest.dtype == "int8":
            row_scale, column_scale = scale_names(name)
            yield spec(row_scale, "float32")
            yield spec(column_scale, "float32", manifest.width, per_shard=True)

    def all_specs() -> Iterator[ArraySpec]:
        yield spec("pair_id", "uint8", PAIR_ID_BYTES)
        yield spec("tokens", "int32", 3)
        yield spec("source", "string")
        yield spec("reason", "string")
        for layer in manifest.layers:
            yield from vectors(f"diff/{layer}")
            yield spec(f"norm/{layer}", "float32")
            if manifest.sides:
                yield from vectors(f"chosen/{layer}")
                yield from vectors(f"rejected/{layer}")
        yield spec("status", "uint8")

    return {one.name: one for one in all_specs()}


def create_arrays(group: zarr.Group, manifest: Manifest) -> None:
    """Create every array of an empty store, without a single chunk."""
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.registry import get_codec_class

    for spec in array_specs(manifest).values():
        described = [] if spec.codec is None else [spec.codec.metadata(spec.numpy_dtype.itemsize)]
        compressor: list[Any] = [get_codec_class(one["name"]).from_dict(one) for one in described]
        group.create_array(
            spec.name,
            shape=(spec.rows, *spec.row_shape),
            chunks=(spec.shard_rows, *spec.row_shape),
            dtype=str if spec.is_text else spec.dtype,
            serializer="auto" if spec.is_text else BytesCodec(endian="little"),
            compressors=[*compressor, Crc32cCodec()],
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


def nonfinite_rows(values: np.ndarray | ScaledRows, dtype: str) -> npt.NDArray[np.bool_]:
    """Which rows hold a NaN or an infinity.

    Args:
        values: [n, D] in the type of the store (bfloat16 as uint16).
        dtype: the store's `dtype`; of int8 rows only the scales are looked at.

    Returns:
        bool [n].
    """
    if isinstance(values, ScaledRows):
        broken: npt.NDArray[np.bool_] = ~(np.isfinite(values.row_scale) & np.isfinite(values.column_scale).all())
        return broken
    # Without its sign, such a number's bits are at least those of infinity: one integer maximum per row,
    # where isfinite would convert every half float.
    kind, magnitude, infinity = _BITS[dtype]
    found: npt.NDArray[np.bool_] = (values.view(kind) & magnitude).max(axis=1) >= infinity
    return found


def to_float32(values: np.ndarray | ScaledRows) -> npt.NDArray[np.float32]:
    """Rows in the type of a store (uint16 are the bits of bfloat16) as float32, exactly, [n, D]."""
    if isinstance(values, ScaledRows):
        return values.decode()
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    if values.dtype == np.float16:
        return half_to_float32(values)
    return values.astype(np.float32)
