"""The bytes of one chunk: the part of one array that one shard holds.

A numeric chunk is S rows, little-endian, the last shard's padded with zeros, then the crc32c of all that.
With a codec, the padded rows are compressed before the checksum.
A text chunk is vlen-utf8 (a count, then length and bytes of each string, lengths uint32), then the crc32c.
These are the bytes that Zarr's own codecs write; writing and reading them here allows a chunk to be made
durable before it gets its name, and to be mapped instead of copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pairtrace.errors import StoreDamagedError
from pairtrace.kernels.checksum import crc32c
from pairtrace.kernels.strings import split_strings
from pairtrace.store.advice import repair_advice
from pairtrace.store.layout import CHECKSUM_BYTES, ArraySpec
from pairtrace.store.location import Location, RawBytes
from pairtrace.store.metadata import read_manifest


def encode(spec: ArraySpec, values: np.ndarray | list[str]) -> list[RawBytes]:
    """The bytes of a chunk, in pieces, so that rows are not copied.

    Args:
        spec: the array.
        values: the rows of one shard, [n, ...] with n <= S in the array's dtype, or n strings.
    """
    if spec.is_text:
        pieces = [_encode_text(list(values), spec.shard_rows)]
    else:
        assert isinstance(values, np.ndarray)
        assert values.dtype == spec.numpy_dtype, f"{spec.name}: {values.dtype} is not {spec.numpy_dtype}"
        rows = np.ascontiguousarray(values, dtype=spec.numpy_dtype).reshape(-1).view(np.uint8)
        pieces = [rows, np.zeros((spec.shard_rows - len(values)) * spec.row_bytes, np.uint8)]
        if spec.codec is not None:
            whole = np.concatenate(pieces) if pieces[1].size else rows
            pieces = [spec.codec.encode(whole, spec.numpy_dtype.itemsize)]
    checksum = 0
    for piece in pieces:
        if piece.size:
            checksum = crc32c(piece, checksum)
    return [*pieces, np.frombuffer(checksum.to_bytes(CHECKSUM_BYTES, "little"), np.uint8)]


def decode(raw: RawBytes, spec: ArraySpec, shard: int, *, checksum: bool) -> np.ndarray:
    """The rows in the bytes of a chunk, without a copy for a numeric array that is not compressed.

    Args:
        raw: all bytes of the chunk.
        spec: the array.
        shard: number of the shard.
        checksum: compare the checksum, which reads every byte; it is always compared where decoding reads them anyway.

    Returns:
        read-only array [n, ...] of the shard's own rows (padding left out), or object [n] of strings.

    Raises:
        ValueError: the length, checksum or compressed form is wrong; the message says which.
    """
    body = _body(raw, spec, checksum=checksum)
    start, stop = spec.span(shard)
    if spec.is_text:
        return _decode_text(body, spec)[: stop - start]
    if spec.codec is not None:
        body = spec.codec.decode(body, spec.body_bytes)
    rows = body[: (stop - start) * spec.row_bytes].view(spec.numpy_dtype)
    return rows.reshape(stop - start, *spec.row_shape)


def _body(raw: RawBytes, spec: ArraySpec, *, checksum: bool) -> RawBytes:
    """The bytes before the checksum, once length and checksum are what they should be; ValueError where not."""
    if spec.chunk_bytes is not None and raw.size != spec.chunk_bytes:
        raise ValueError(wrong_size(raw.size, spec))
    if raw.size < CHECKSUM_BYTES:
        raise ValueError(f"its chunk has only {raw.size} bytes")
    body = raw[:-CHECKSUM_BYTES]
    if checksum or spec.chunk_bytes is None:
        expected, actual = _written_checksum(raw), crc32c(body)
        if actual != expected:
            raise ValueError(_wrong_checksum(actual, expected))
    return body


def wrong_size(size: int, spec: ArraySpec) -> str:
    """What to say of an uncompressed chunk that has `size` bytes."""
    return f"its chunk has {size} bytes instead of {spec.chunk_bytes}"


def _written_checksum(raw: RawBytes) -> int:
    return int.from_bytes(raw[-CHECKSUM_BYTES:].tobytes(), "little")


def _wrong_checksum(actual: int, expected: int) -> str:
    return f"its checksum is {actual:08x} where {expected:08x} was written"


def find_chunk(location: Location, spec: ArraySpec, shard: int, *, checksum: bool = True) -> np.ndarray | None:
    """The rows of one shard of one array (see `decode`), or None when there is no such chunk.

    Raises:
        StoreDamagedError: the chunk has the wrong length or (if compared) the wrong checksum.
    """
    raw = location.read(spec.key(shard))
    if raw is None:
        return None
    try:
        return decode(raw, spec, shard, checksum=checksum)
    except ValueError as error:
        raise damaged(location, spec, shard, str(error)) from error


def read_chunk(location: Location, spec: ArraySpec, shard: int, *, checksum: bool = True) -> np.ndarray:
    """The rows of one shard of one array; see `decode`.

    Raises:
        StoreDamagedError: the chunk is missing, has the wrong length, or (if compared) the wrong checksum.
    """
    rows = find_chunk(location, spec, shard, checksum=checksum)
    if rows is None:
        raise damaged(location, spec, shard, "its chunk is missing")
    return rows


@dataclass(frozen=True, eq=False)
class UncheckedChunk:
    """A numeric chunk whose rows can be read while its checksum is still to be compared by whoever reads them.

    Attributes:
        rows: [n, ...], a view of `body`.
        body: uint8, the bytes that the checksum covers.
        expected: the CRC-32C that was written.
        location: the store.
        spec: the array.
        shard: number of the shard.
    """

    rows: np.ndarray
    body: RawBytes
    expected: int
    location: Location
    spec: ArraySpec
    shard: int

    def compare(self, actual: int) -> None:
        """Compare the checksum of `body`.

        Raises:
            StoreDamagedError: it is another one: nothing made of the rows may be used.
        """
        if actual != self.expected:
            raise damaged(self.location, self.spec, self.shard, _wrong_checksum(actual, self.expected))


def open_chunk(location: Location, spec: ArraySpec, shard: int) -> UncheckedChunk:
    """The rows of one shard of an uncompressed array, checksum not yet compared.

    Raises:
        StoreDamagedError: the chunk is missing or has the wrong length.
    """
    assert not spec.is_text and spec.codec is None, spec.name
    raw = location.read(spec.key(shard))
    if raw is None:
        raise damaged(location, spec, shard, "its chunk is missing")
    try:
        rows = decode(raw, spec, shard, checksum=False)
    except ValueError as error:
        raise damaged(location, spec, shard, str(error)) from error
    return UncheckedChunk(rows, raw[:-CHECKSUM_BYTES], _written_checksum(raw), location, spec, shard)


def read_strings(
    location: Location, spec: ArraySpec, shard: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The strings of one shard of a text array, without a Python object for each.

    Returns:
        offsets int64 [n + 1] and their UTF-8 bytes, as `kernels.strings.split_strings` gives them.

    Raises:
        StoreDamagedError: the chunk is missing, has the wrong content, or the wrong checksum.
    """
    raw = location.read(spec.key(shard))
    if raw is None:
        raise damaged(location, spec, shard, "its chunk is missing")
    try:
        offsets, data = split_strings(_body(raw, spec, checksum=True), spec.shard_rows)
    except ValueError as error:
        raise damaged(location, spec, shard, str(error)) from error
    start, stop = spec.span(shard)
    return offsets[: stop - start + 1], data[: offsets[stop - start]]


def damaged(location: Location, spec: ArraySpec, shard: int, what: str) -> StoreDamagedError:
    """The error for a damaged chunk, with the way to repair it."""
    start, stop = spec.pair_span(shard)
    mark = f"{location.name.rstrip('/')}/status/c/{shard}"
    # The manifest was readable when the store was opened; where it no longer is, that is the next error.
    manifest = read_manifest(location)
    again = "make the store again" if manifest is None else repair_advice(manifest, location.name)
    return StoreDamagedError(
        f"{location.name}: array {spec.name}, shard {shard} (rows {start} to {stop - 1}) is damaged: {what}. "
        f"To compute only these rows again, delete {mark} and {again}"
    )


def _encode_text(values: list[str], shard_rows: int) -> RawBytes:
    codec = _text_codec()
    padded = np.array([*values, *[""] * (shard_rows - len(values))], dtype=object)
    return np.frombuffer(codec.encode(padded), np.uint8)


def _decode_text(body: RawBytes, spec: ArraySpec) -> np.ndarray:
    values = np.asarray(_text_codec().decode(body.tobytes()), dtype=object)
    if len(values) != spec.shard_rows:
        raise ValueError(f"its chunk holds {len(values)} strings instead of {spec.shard_rows}")
    return values


def _text_codec() -> Any:
    import numcodecs

    return numcodecs.VLenUTF8()
