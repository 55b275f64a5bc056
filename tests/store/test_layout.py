from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.store.chunks import decode, encode
from pairtrace.store.codecs import parse_codec
from pairtrace.store.layout import ArraySpec, array_specs, nonfinite_rows
from tests.store.samples import cast, expected_arrays, make_block, make_manifest, shard_count, write_store

DTYPES = ["float16", "float32", "bfloat16"]
STORES = [
    *((dtype, "none") for dtype in (*DTYPES, "int8")),
    ("float16", "zstd:3"),
    ("bfloat16", "blosc-zstd:1"),
    ("int8", "blosc-lz4:9"),
    ("float32", "blosc-lz4:1"),
]


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition (RFC 3720, reflected polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("dtype", "codec"), STORES)
@pytest.mark.parametrize("sides", [False, True])
def test_zarr_alone_reads_every_array(tmp_path: Path, dtype: str, codec: str, sides: bool) -> None:
    manifest = make_manifest(dtype=dtype, sides=sides, codec=codec)
    write_store(tmp_path / "acts.zarr", manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the lock file must not make a group listing complain
        group = zarr.open_group(tmp_path / "acts.zarr", mode="r")
        found = {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    expected = expected_arrays(manifest)
    assert set(found) == set(expected)
    for name, array in found.items():
        values: Any = array[:]
        if name in ("source", "reason"):
            assert values.tolist() == expected[name]
        else:
            assert values.dtype == expected[name].dtype, name
            np.testing.assert_array_equal(values, expected[name])
    assert group.attrs["pairtrace"] == manifest.to_json()


def test_a_chunk_file_is_the_rows_then_their_checksum(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest)
    for shard in range(shard_count(manifest)):
        block = make_block(manifest, shard)
        padded = np.zeros((manifest.shard_rows, manifest.width), "<f2")
        padded[: len(block.status)] = block.diff[5]
        raw = padded.tobytes()
        file = tmp_path / "diff" / "5" / "c" / str(shard) / "0"
        assert file.read_bytes() == raw + crc32c(raw).to_bytes(4, "little")


@pytest.mark.parametrize(("dtype", "codec"), STORES)
def test_the_array_metadata_on_disk_is_the_one_described(tmp_path: Path, dtype: str, codec: str) -> None:
    manifest = make_manifest(sides=True, dtype=dtype, codec=codec)
    write_store(tmp_path, manifest, [])
    for name, spec in array_specs(manifest).items():
        actual = json.loads((tmp_path / name / "zarr.json").read_text())
        expected = spec.metadata()
        for one in (*actual["codecs"], *expected["codecs"]):
            if one.get("configuration") == {}:
                del one["configuration"]
        assert {key: actual[key] for key in expected} == expected, name


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(["float16", "float32", "uint16", "uint8", "int8", "int32", "string"]),
    codec=st.sampled_from(["none", "zstd:1", "zstd:19", "blosc-lz4:5", "blosc-zstd:3"]),
    rows=st.integers(1, 9),
    shard_rows=st.integers(1, 12),
    width=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_chunk_bytes_equal_those_that_zarr_writes(
    dtype: str, codec: str, rows: int, shard_rows: int, width: int | None, seed: int
) -> None:
    """Our encoder is the fast path; zarr's array assignment is the general one."""
    rng = np.random.default_rng(seed)
    text = dtype == "string"
    shape = () if width is None or text else (width,)
    compressor = None if text else parse_codec(codec)
    spec = ArraySpec(
        name="x",
        dtype=dtype,
        rows=rows,
        shard_rows=shard_rows,
        row_shape=shape,
        codec=compressor,
        pairs=rows,
        shard_pairs=shard_rows,
    )
    theirs = {"zstd": zarr.codecs.ZstdCodec, "blosc": zarr.codecs.BloscCodec}
    described = [] if compressor is None else [compressor.metadata(spec.numpy_dtype.itemsize)]
    store = zarr.storage.MemoryStore()
    array = zarr.create_group(store).create_array(
        "x",
        shape=(rows, *shape),
        chunks=(shard_rows, *shape),
        dtype=str if text else dtype,
        compressors=[*(theirs[one["name"]](**one["configuration"]) for one in described), zarr.codecs.Crc32cCodec()],
        filters=None,
        fill_value="" if text else 0,
        config={"write_empty_chunks": True},
    )
    values: Any
    if text:
        values = ["", "a", "Zürich", "\0", "🙂" * 3, "b", "", "cc", "d"][:rows]
        array[:] = np.array(values, dtype=object)
    else:
        values = rng.integers(0, 255, (rows, *shape)).astype(dtype)
        array[:] = values
    for shard in range(spec.shards):
        start, stop = spec.span(shard)
        ours = b"".join(piece.tobytes() for piece in encode(spec, values[start:stop]))
        assert ours == store._store_dict[spec.key(shard)].to_bytes()
        back = decode(np.frombuffer(ours, np.uint8), spec, shard, checksum=True)
        assert back.tolist() == (values[start:stop] if text else values[start:stop].tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_rows_against_isfinite(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(200, 7)) * 1000).astype(np.float32)
    extremes = [np.nan, -np.nan, np.inf, -np.inf, 65504.0, -65504.0, 6e-8, 0.0]
    values[np.arange(160), rng.integers(0, 7, 160)] = np.resize(extremes, 160)
    expected = ~np.isfinite(values).all(axis=1)
    np.testing.assert_array_equal(nonfinite_rows(cast(values, dtype), dtype), expected)
    assert expected.sum() == 80
