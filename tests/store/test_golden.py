"""The bytes on disk do not change under a schema version; see tests/golden/make_store.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store import shard_block
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.golden import make_store as golden
from tests.store.samples import chunk_files, tree_bytes

GROUPS = ("diff", "chosen", "rejected")
CHUNKS = {"acts.zarr": 18, "int8.zarr": 18 + 2 * 2 * 3, "zstd.zarr": 18, "blosc.zarr": 18}


def assert_same_bytes(root: Path, name: str) -> None:
    kept = golden.FOLDER / name
    golden.write(root, golden.STORES[name])
    files = [path.relative_to(kept) for path in chunk_files(kept)]
    assert files == [path.relative_to(root) for path in chunk_files(root)]
    assert len(files) == CHUNKS[name]
    for file in files:
        # Another release of a compressor may find other bytes for the same rows; reading the kept ones is what counts.
        if golden.STORES[name].codec == "none" or file.parts[0] not in GROUPS:
            assert (root / file).read_bytes() == (kept / file).read_bytes(), file
    made, wanted = (json.loads((path / "zarr.json").read_text()) for path in (root, kept))
    assert made["attributes"] == wanted["attributes"]
    for file in sorted(kept.glob("*/7/zarr.json")):
        made, wanted = (json.loads((path / file.relative_to(kept)).read_text()) for path in (root, kept))
        assert made["codecs"] == wanted["codecs"] and made["data_type"] == wanted["data_type"]


@pytest.mark.parametrize("name", golden.STORES)
def test_the_writer_makes_the_golden_bytes(tmp_path: Path, name: str) -> None:
    assert_same_bytes(tmp_path / name, name)


def test_a_changed_encoding_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = shard_block.encode
    monkeypatch.setattr(shard_block, "encode", lambda spec, values: encode(spec, values)[:-1])
    with pytest.raises(AssertionError):
        assert_same_bytes(tmp_path / "acts.zarr", "acts.zarr")


@pytest.mark.parametrize("name", golden.STORES)
def test_the_golden_store_is_read(name: str) -> None:
    manifest = golden.STORES[name]
    store = ActivationStore.open(golden.FOLDER / name)
    assert store.manifest == manifest and store.manifest.schema_version == (1 if name == "acts.zarr" else 2)
    for array, expected in zip(GROUPS, (golden.DIFF, golden.CHOSEN, golden.REJECTED), strict=True):
        found = [rows.decode() if isinstance(rows, ScaledRows) else rows for _, rows in store.blocks(7, array)]
        np.testing.assert_array_equal(np.concatenate(found), expected)
        np.testing.assert_array_equal(store.take(7, [2, 0], array), expected[[2, 0]])
    np.testing.assert_array_equal(store.norms(7), golden.NORM)
    np.testing.assert_array_equal(store.pair_ids(), golden.PAIR_ID)
    np.testing.assert_array_equal(store.tokens(), golden.TOKENS)
    np.testing.assert_array_equal(store.status(), golden.STATUS)
    assert store.reasons().tolist() == golden.REASON
    assert store.sources().tolist() == golden.SOURCE
    assert verify(golden.FOLDER / name).problems == ()


def test_zarr_alone_reads_the_golden_int8_store() -> None:
    group: Any = zarr.open_group(golden.FOLDER / "int8.zarr", mode="r")
    shard_of_row = np.arange(3) // group["diff/7"].chunks[0]
    scales = group["row_scale/diff/7"][:][:, None] * group["column_scale/diff/7"][:][shard_of_row]
    np.testing.assert_array_equal(group["diff/7"][:] * scales, golden.DIFF)


@pytest.mark.parametrize("name", golden.STORES)
def test_a_golden_store_is_resumed(tmp_path: Path, name: str) -> None:
    """Also one of schema 1, which stays one, by a run that asks for the settings in the terms of schema 2."""
    root = tmp_path / name
    shutil.copytree(golden.FOLDER / name, root)
    before = tree_bytes(root)
    (root / "status/c/1").unlink()
    manifest = golden.STORES[name]
    wanted = type(manifest)(**{**manifest.__dict__, "schema_version": 2})
    with StoreWriter.create_or_resume(root, wanted) as writer:
        assert writer.manifest == manifest and writer.missing_shards() == [1]
    golden.write(root, wanted)
    assert set(tree_bytes(root)) == set(before)
    if manifest.codec == "none":
        assert tree_bytes(root) == before
    assert ActivationStore.open(root).manifest == manifest
