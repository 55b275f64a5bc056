"""A digest of the content of a table, the same however its rows are cut into batches.

Every column, and every level of a nested one, is a stream of its own: which values are there, how long they are, their
bytes. A stream is hashed in row order, so that batches and chunks leave no trace in it. What Arrow leaves open, such as
the bytes under a null or whether a bitmap without nulls exists, is not hashed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_DIGEST_BYTES = 32


class RowDigest:
    """BLAKE2b over names, types and values of rows that come in batches.

    Args:
        schema: of the rows; its metadata counts, that of its fields does not.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._rows = 0
        self._streams: dict[str, Any] = {}
        self._head = {
            "fields": [[field.name, str(field.type), field.nullable] for field in schema],
            "metadata": sorted((key.hex(), value.hex()) for key, value in (schema.metadata or {}).items()),
        }

    def update(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._rows += batch.num_rows
        for number, column in enumerate(batch.columns):
            self._add(str(number), column)

    def hexdigest(self) -> str:
        """Of the rows so far."""
        parts = {name: stream.hexdigest() for name, stream in self._streams.items()}
        whole = json.dumps({**self._head, "rows": self._rows, "streams": parts}, sort_keys=True)
        return str(_hasher(whole.encode()).hexdigest())

    def _add(self, name: str, array: Any) -> None:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        kind = array.type
        self._feed(f"{name} valid", _bytes_of(array.is_valid().cast(pa.uint8())))
        if pa.types.is_struct(kind):
            assert isinstance(array, pa.StructArray)
            for number, child in enumerate(array.flatten()):
                self._add(f"{name}.{number}", child)
            return
        present = array.drop_null()
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = np.diff(present.offsets.to_numpy()).astype(np.int64)
            self._feed(f"{name} lengths", lengths.tobytes())
            self._add(f"{name}[]", present.flatten())
        elif pa.types.is_fixed_size_list(kind):
            self._add(f"{name}[]", present.flatten())
        elif _is_text(kind):
            self._feed(f"{name} lengths", _bytes_of(pc.binary_length(present).cast(pa.int64())))
            self._feed(name, _text_of(present))
        elif pa.types.is_boolean(kind):
            self._feed(name, _bytes_of(present.cast(pa.uint8())))
        elif pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind):
            self._feed(name, _bytes_of(present))
        elif not pa.types.is_null(kind):
            self._feed(name, "".join(f"{value!r}\n" for value in present.to_pylist()).encode())

    def _feed(self, name: str, data: Any) -> None:
        if name not in self._streams:
            self._streams[name] = _hasher()
        self._streams[name].update(data)


def _hasher(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES)


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _bytes_of(array: pa.Array[Any]) -> memoryview:
    """The values of an array of fixed width without nulls."""
    width = array.type.bit_width // 8
    values = array.buffers()[1]
    if values is None:
        return memoryview(b"")
    return memoryview(values)[array.offset * width : (array.offset + len(array)) * width]


def _text_of(array: pa.Array[Any]) -> memoryview:
    """The bytes of strings without nulls, one behind the other."""
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, places, data = array.buffers()
    if not len(array) or data is None:
        return memoryview(b"")
    assert places is not None
    offsets = np.frombuffer(memoryview(places), np.dtype(np.int64 if wide else np.int32))
    return memoryview(data)[int(offsets[array.offset]) : int(offsets[array.offset + len(array)])]
