from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pairtrace.errors import StoreDamagedError, StoreError
from pairtrace.store.layout import to_float32
from pairtrace.store.location import LocalLocation
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader
from tests.store.samples import expected_arrays, make_manifest, write_store

MANIFEST = make_manifest(sides=True)
NAMES = sorted(expected_arrays(MANIFEST))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "acts.zarr"
    write_store(path, MANIFEST)
    return path


def damage(root: Path, name: str, shard: int) -> None:
    """Flip the lowest bit of the first byte of a chunk: for a vector, one of the smallest changes there are."""
    path = next(p for p in (root / name / "c").rglob("*") if p.is_file() and f"/c/{shard}" in str(p))
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", NAMES)
def test_any_rows_of_any_array(root: Path, name: str) -> None:
    wanted = [9, 0, 4, 4, 7, 1, 8]
    taken = RowReader.open(root).take(name, wanted)
    expected = expected_arrays(MANIFEST)[name]
    assert taken.tolist() == [expected[row] if isinstance(expected, list) else expected[row].tolist() for row in wanted]
    assert len(RowReader.open(root).take(name, [])) == 0


def test_shards_written_since_are_seen(tmp_path: Path) -> None:
    write_store(tmp_path, MANIFEST, [0])
    reader = RowReader.open(tmp_path)
    assert reader.status([3, 0]).tolist() == [2, 1]
    with pytest.raises(StoreDamagedError, match=r"array status, shard 1 \(rows 4 to 7\).*missing"):
        reader.status([3, 4])
    write_store(tmp_path, MANIFEST)
    assert reader.status([3, 4, 8]).tolist() == [2, 1, 2]
    np.testing.assert_array_equal(reader.take("diff/5", [8]), expected_arrays(MANIFEST)["diff/5"][[8]])


def test_a_mark_without_a_status_is_damage(root: Path) -> None:
    (root / "status/c/1").write_bytes(bytes(4) + bytes.fromhex("48674bc7")[::-1])
    with pytest.raises(StoreDamagedError, match=r"array status, shard 1 .* rows without a status"):
        RowReader.open(root).status([0, 5])
    assert RowReader.open(root).status([0]).tolist() == [1]


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        RowReader.open(tmp_path / "nothing")


def test_only_the_chunks_concerned_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, keys = RowReader.open(root), []
    original = LocalLocation.read

    def logged(self: LocalLocation, key: str) -> np.ndarray | None:
        keys.append(key)
        return original(self, key)

    monkeypatch.setattr(LocalLocation, "read", logged)
    reader.status([4, 5])
    reader.take("reason", [5])
    reader.take("norm/5", [9, 8, 9])
    reader.take("diff/2", [9, 0])
    assert keys == ["status/c/1", "reason/c/1", "norm/5/c/2", "diff/2/c/0/0", "diff/2/c/2/0"]


# Checksums


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named(root: Path, name: str) -> None:
    damage(root, name, 1)
    reader = RowReader.open(root)
    with pytest.raises(StoreDamagedError, match=rf"{root}: array {name}, shard 1 \(rows 4 to 7\).*checksum"):
        reader.take(name, [0, 6])
    reader.take(name, [0, 9])


TAKES: dict[str, Callable[[ActivationStore], object]] = {
    "diff/5": lambda s: s.take(5, [0, 6], checksum=True),
    "chosen/2": lambda s: s.take(2, [0, 6], "chosen", checksum=True),
    "rejected/2": lambda s: s.take(2, [6], "rejected", checksum=True),
}


@pytest.mark.parametrize("name", TAKES)
def test_take_compares_checksums_on_request(root: Path, name: str) -> None:
    array, layer = name.split("/")
    damage(root, name, 1)
    store = ActivationStore.open(root)
    store.take(int(layer), [0, 6], array)
    with pytest.raises(StoreDamagedError, match=f"array {name}, shard 1"):
        TAKES[name](store)


def test_checksums_are_compared_once_for_each_store_opened(root: Path) -> None:
    by_take, by_blocks = ActivationStore.open(root), ActivationStore.open(root)
    by_take.take(5, [5], checksum=True)
    list(by_blocks.blocks(5))
    damage(root, "diff/5", 1)
    list(by_take.blocks(5))
    by_blocks.take(5, [5], checksum=True)
    by_blocks.row_reader().take("diff/5", [5])
    with pytest.raises(StoreDamagedError):
        ActivationStore.open(root).take(5, [5], checksum=True)


# Rows wide enough to be copied out of the file without mapping it


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_wide_rows_are_those_of_the_blocks(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(width=2048, dtype=dtype, layers=(5,))
    write_store(tmp_path, manifest)
    store = ActivationStore.open(tmp_path)
    whole = np.concatenate([to_float32(rows) for _, rows in store.blocks(5)])
    mapped = []
    original = LocalLocation.read
    monkeypatch.setattr(LocalLocation, "read", lambda self, key: mapped.append(key) or original(self, key))
    wanted = [9, 0, 4, 4, 7, 1, 8]
    np.testing.assert_array_equal(to_float32(store.take(5, wanted)), whole[wanted])
    assert store.take(5, []).shape == (0, 2048)
    assert not [key for key in mapped if key.startswith("diff/")]


@pytest.mark.parametrize(("case", "message"), [("missing", "chunk is missing"), ("short", "16383 bytes instead of")])
def test_a_wide_chunk_that_is_not_whole_is_named(case: str, message: str, tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest(width=2048, layers=(5,)))
    store = ActivationStore.open(tmp_path)
    path = tmp_path / "diff/5/c/1/0"
    if case == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:16383])
    assert store.take(5, [0, 9]).shape == (2, 2048)
    with pytest.raises(StoreDamagedError, match=rf"array diff/5, shard 1 \(rows 4 to 7\).*{message}"):
        store.take(5, [0, 6])


def test_a_wide_chunk_that_is_cut_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, make_manifest(width=2048, layers=(5,)))
    store = ActivationStore.open(tmp_path)
    path = tmp_path / "diff/5/c/1/0"
    original = os.preadv

    def cut(handle: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 4096 * 2 + 100)
        return original(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(StoreDamagedError, match=r"array diff/5, shard 1.*8292 bytes instead of 16388"):
        store.take(5, [6])
