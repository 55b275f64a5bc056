from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import (
    ConfigError,
    LayerError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreSchemaError,
)
from pairtrace.store import chunks
from pairtrace.store.layout import ArraySpec
from pairtrace.store.location import Location
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import StoreWriter
from tests.store.samples import expected_arrays, make_manifest, write_store

MANIFEST = make_manifest(sides=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "acts.zarr"
    write_store(path, MANIFEST)
    return path


def assert_same_content(store: ActivationStore, expected: dict[str, Any]) -> None:
    np.testing.assert_array_equal(store.status(), expected["status"])
    np.testing.assert_array_equal(store.pair_ids(), expected["pair_id"])
    np.testing.assert_array_equal(store.tokens(), expected["tokens"])
    assert store.sources().tolist() == expected["source"]
    offsets, data = store.source_strings()
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    assert [data[start:stop].tobytes().decode() for start, stop in spans] == expected["source"]
    assert store.reasons().tolist() == expected["reason"]
    for layer in store.layers:
        norms = store.norms(layer)
        assert norms.dtype == np.float32
        np.testing.assert_array_equal(norms, expected[f"norm/{layer}"])
        for array in ("diff", "chosen", "rejected") if store.manifest.sides else ("diff",):
            whole = expected[f"{array}/{layer}"]
            pieces = list(store.blocks(layer, array))
            assert [start for start, _ in pieces] == list(range(0, store.rows, store.manifest.shard_rows))
            joined = np.concatenate([rows for _, rows in pieces])
            assert joined.dtype == whole.dtype
            np.testing.assert_array_equal(joined, whole)
            np.testing.assert_array_equal(store.take(layer, np.arange(store.rows), array), whole)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("sides", [False, True])
@pytest.mark.parametrize(("rows", "shard_rows"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_everything_written_is_read_back(tmp_path: Path, dtype: str, sides: bool, rows: int, shard_rows: int) -> None:
    manifest = make_manifest(dtype=dtype, sides=sides, rows=rows, shard_rows=shard_rows)
    write_store(tmp_path, manifest)
    store = ActivationStore.open(tmp_path)
    assert (store.manifest, store.rows, store.width, store.layers) == (manifest, rows, 6, (2, 5))
    assert_same_content(store, expected_arrays(manifest))


def test_an_object_store_gives_the_same(root: Path, tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/acts.zarr"
    with pytest.raises(StoreError, match="not a pairtrace store"):
        ActivationStore.open(address)
    write_store(address, MANIFEST, [1])
    with StoreWriter.create_or_resume(address, MANIFEST) as writer:
        assert writer.missing_shards() == [0, 2]
    write_store(address, MANIFEST)
    remote, local = ActivationStore.open(address), ActivationStore.open(root)
    assert_same_content(remote, expected_arrays(MANIFEST))
    assert remote.summary() == local.summary()


def test_a_file_address_is_a_local_path(root: Path) -> None:
    assert ActivationStore.open(f"file://{root}").path == str(root)


def test_an_object_store_with_something_else_is_left_alone(tmp_path: Path) -> None:
    import zarr

    address = f"memory://{tmp_path.name}/other.zarr"
    zarr.open_group(address, mode="w").create_array("mine", shape=(3,), dtype="int8")
    with pytest.raises(StoreError, match="already holds mine"):
        StoreWriter.create_or_resume(address, MANIFEST)
    assert sorted(zarr.open_group(address, mode="r").keys()) == ["mine"]


# Blocks and rows


def test_blocks_are_views_of_the_files(root: Path) -> None:
    for _, rows in ActivationStore.open(root).blocks(2):
        assert not rows.flags.owndata and not rows.flags.writeable and rows.flags.c_contiguous
        owner: Any = rows
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner.obj if isinstance(owner, memoryview) else owner, mmap.mmap)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 30), shard_rows=st.integers(1, 12), block_rows=st.integers(1, 40), data=st.data())
def test_block_size_and_row_order_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: int, shard_rows: int, block_rows: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("acts")
    manifest = make_manifest(rows=rows, shard_rows=shard_rows, layers=(3,))
    write_store(path, manifest)
    store = ActivationStore.open(path)
    whole = expected_arrays(manifest)["diff/3"]
    seen = 0
    for start, block in store.blocks(3, block_rows=block_rows):
        assert start == seen and 1 <= len(block) <= min(block_rows, shard_rows)
        np.testing.assert_array_equal(block, whole[start : start + len(block)])
        seen += len(block)
    assert seen == rows
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=40))
    taken = store.take(3, wanted)
    assert taken.shape == (len(wanted), 6) and taken.flags.writeable
    np.testing.assert_array_equal(taken, whole[np.array(wanted, dtype=int)])


def test_what_is_not_in_the_store(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest())
    store = ActivationStore.open(tmp_path)
    for read in (lambda: store.blocks(3), lambda: store.take(3, [0]), lambda: store.norms(3)):
        with pytest.raises(LayerError, match=r"layer 3 .* holds layers 2, 5"):
            read()
    with pytest.raises(ConfigError, match="--sides"):
        store.blocks(2, "chosen")
    with pytest.raises(ConfigError, match="one of diff, chosen, rejected"):
        store.take(2, [0], "norm")
    for row in (-1, 10):
        with pytest.raises(ConfigError, match=f"row {row} is outside .* rows 0 to 9"):
            store.take(2, [0, row])
    for rows in (np.ones(10, bool), [1.0], [[1]], 3):
        with pytest.raises(ConfigError, match="list of row numbers"):
            store.take(2, rows)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block_rows"):
        store.blocks(2, block_rows=0)


def test_status_cannot_be_changed_by_a_reader(root: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        ActivationStore.open(root).status()[0] = 0


def test_summary_counts_every_row(root: Path) -> None:
    summary = ActivationStore.open(root).summary()
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != ".lock")
    assert summary == {
        "rows": 10,
        "ok": 8,
        "quarantined": 2,
        "missing": 0,
        "bytes": size,
        "reasons": {"empty_response": 2},
    }


# Incomplete stores


def test_an_incomplete_store(tmp_path: Path) -> None:
    root = tmp_path / "my acts.zarr"
    write_store(root, MANIFEST, [0, 2])
    with pytest.raises(StoreIncompleteError) as caught:
        ActivationStore.open(root)
    message = str(caught.value)
    assert "4 of 10 rows are missing" in message
    assert f"pairtrace extract pairs.jsonl --model tiny --layers 2,5 --store '{root}'" in message

    store = ActivationStore.open(root, allow_incomplete=True)
    expected = expected_arrays(MANIFEST)
    here = np.array([True] * 4 + [False] * 4 + [True] * 2)
    np.testing.assert_array_equal(store.status(), np.where(here, expected["status"], 0))
    assert [(start, len(rows)) for start, rows in store.blocks(2)] == [(0, 4), (8, 2)]
    np.testing.assert_array_equal(list(store.blocks(2))[1][1], expected["diff/2"][8:])
    np.testing.assert_array_equal(store.take(2, [9, 0]), expected["diff/2"][[9, 0]])
    for row in (4, 7):
        with pytest.raises(StoreIncompleteError, match=f"1 of the rows .* the first is row {row}"):
            store.take(2, [0, row, 9])
    assert np.isnan(store.norms(5)[4:8]).all() and not np.isnan(store.norms(5)[here]).any()
    assert np.diff(store.source_strings()[0]).tolist() == [len(name) for name in store.sources()]
    assert not store.pair_ids()[4:8].any() and store.sources()[4:8].tolist() == [""] * 4
    counts = store.summary()
    assert (counts["ok"], counts["quarantined"], counts["missing"]) == (4, 2, 4)


def test_what_is_finished_is_decided_at_opening(tmp_path: Path) -> None:
    write_store(tmp_path, MANIFEST, [0])
    store = ActivationStore.open(tmp_path, allow_incomplete=True)
    write_store(tmp_path, MANIFEST)
    assert [start for start, _ in store.blocks(2)] == [0]
    assert np.isnan(store.norms(2)[4:]).all()


# Damage


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[(bit // 8) % len(raw)] ^= 1 << (bit % 8)
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_whole_rows(path: Path) -> None:
    """What a reader that trusts the length of the file takes for a shorter shard."""
    whole = path.read_bytes()
    path.write_bytes(whole[: (len(whole) - 4) // 2 + 4])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(12))


def empty(path: Path) -> None:
    path.write_bytes(b"")


READS: dict[str, Callable[[ActivationStore], object]] = {
    "diff/5": lambda s: list(s.blocks(5)),
    "chosen/2": lambda s: list(s.blocks(2, "chosen")),
    "rejected/2": lambda s: list(s.blocks(2, "rejected", 1)),
    "norm/5": lambda s: s.norms(5),
    "pair_id": lambda s: s.pair_ids(),
    "tokens": lambda s: s.tokens(),
    "source": lambda s: s.sources(),
    "reason": lambda s: s.summary(),
}
LENGTH_HARMS = [cut, cut_to_whole_rows, grow, empty, Path.unlink]


def chunk_path(root: Path, name: str, shard: int) -> Path:
    return next(path for path in (root / name / "c").rglob("*") if path.is_file() and f"/c/{shard}" in str(path))


def assert_damage_is_named(root: Path, name: str, read: Callable[[ActivationStore], object]) -> None:
    store = ActivationStore.open(root)
    with pytest.raises(StoreDamagedError) as caught:
        read(store)
    message = str(caught.value)
    assert f"array {name}, shard 1 (rows 4 to 7)" in message
    assert f"delete {root}/status/c/1 and run the same extraction again: pairtrace extract" in message


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("harm", LENGTH_HARMS)
def test_chunks_of_a_wrong_length_are_refused(root: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(chunk_path(root, name, 1))
    assert_damage_is_named(root, name, READS[name])


@pytest.mark.parametrize("harm", [*LENGTH_HARMS, lambda path: flip(path, 50)])
def test_source_strings_refuse_damaged_chunks(root: Path, harm: Callable[[Path], None]) -> None:
    harm(chunk_path(root, "source", 1))
    assert_damage_is_named(root, "source", lambda s: s.source_strings())


@pytest.mark.parametrize("harm", LENGTH_HARMS)
def test_take_refuses_chunks_of_a_wrong_length(root: Path, harm: Callable[[Path], None]) -> None:
    harm(chunk_path(root, "diff/5", 1))
    store = ActivationStore.open(root)
    assert_damage_is_named(root, "diff/5", lambda s: s.take(5, [9, 4]))
    assert store.take(5, [9, 3]).shape == (2, 6)


@pytest.mark.parametrize("name", READS)
def test_flipped_bits_are_found(root: Path, name: str) -> None:
    path = chunk_path(root, name, 1)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in [0, 8 * len(whole) - 1, *rng.integers(0, 8 * len(whole), 20).tolist()]:
        flip(path, bit)
        assert_damage_is_named(root, name, READS[name])
        path.write_bytes(whole)


def test_nothing_of_a_damaged_shard_is_handed_out(root: Path) -> None:
    flip(chunk_path(root, "diff/5", 1), 8 * 47)  # in its last row
    seen = []
    with pytest.raises(StoreDamagedError):
        seen.extend(start for start, _ in ActivationStore.open(root).blocks(5, block_rows=1))
    assert seen == [0, 1, 2, 3]


def test_checksums_are_compared_once_and_on_request(root: Path) -> None:
    store = ActivationStore.open(root)
    list(store.blocks(5))
    flip(chunk_path(root, "diff/5", 1), 3)
    list(store.blocks(5))
    list(ActivationStore.open(root).blocks(5, checksum=False))
    with pytest.raises(StoreDamagedError):
        list(ActivationStore.open(root).blocks(5))


@pytest.mark.parametrize("harm", [cut, empty, lambda path: flip(path, 9)])
def test_a_damaged_mark_is_found_at_opening(root: Path, harm: Callable[[Path], None]) -> None:
    harm(chunk_path(root, "status", 1))
    with pytest.raises(StoreDamagedError, match=r"array status, shard 1 \(rows 4 to 7\)"):
        ActivationStore.open(root, allow_incomplete=True)


def test_the_advice_repairs_the_store(root: Path) -> None:
    flip(chunk_path(root, "diff/5", 1), 77)
    (root / "status/c/1").unlink()
    write_store(root, MANIFEST)
    assert_same_content(ActivationStore.open(root), expected_arrays(MANIFEST))


def test_a_reader_that_trusts_the_file_length_is_caught(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(raw: np.ndarray, spec: ArraySpec, shard: int, *, checksum: bool) -> np.ndarray:
        rows = (raw.size - 4) // spec.row_bytes
        body = raw[: rows * spec.row_bytes].view(spec.numpy_dtype).reshape(rows, *spec.row_shape)
        return body[: spec.span(shard)[1] - spec.span(shard)[0]]

    cut_to_whole_rows(chunk_path(root, "diff/5", 1))
    assert_damage_is_named(root, "diff/5", READS["diff/5"])
    monkeypatch.setattr(chunks, "decode", trusting)
    with pytest.raises(pytest.fail.Exception):
        assert_damage_is_named(root, "diff/5", READS["diff/5"])


def test_a_reader_that_ignores_missing_rows_is_caught(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr itself reads a missing chunk as zeros: that must not be possible here."""

    def zeros(location: Location, spec: ArraySpec, shard: int, *, checksum: bool = True) -> np.ndarray:
        if location.size(spec.key(shard)) is not None:
            return chunks.read_chunk(location, spec, shard, checksum=checksum)
        start, stop = spec.span(shard)
        return np.zeros((stop - start, *spec.row_shape), spec.numpy_dtype)

    chunk_path(root, "diff/5", 1).unlink()
    monkeypatch.setattr("pairtrace.store.rows.read_chunk", zeros)
    with pytest.raises(AssertionError):
        assert_same_content(ActivationStore.open(root), expected_arrays(MANIFEST))


def test_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="no such store"):
        ActivationStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="is a file, not an activation store"):
        ActivationStore.open(tmp_path / "file")
    with pytest.raises(StoreError, match="not a pairtrace store"):
        ActivationStore.open(tmp_path)


def test_a_manifest_that_cannot_be_read(root: Path) -> None:
    whole = (root / "zarr.json").read_bytes()
    for content in (b"", whole[:-20], b"[]", b"\xff\xfe"):
        (root / "zarr.json").write_bytes(content)
        with pytest.raises(StoreDamagedError, match=r"zarr\.json"):
            ActivationStore.open(root)
    (root / "zarr.json").write_bytes(whole.replace(b'"width"', b'"widht"'))
    with pytest.raises(StoreDamagedError, match=r"missing fields .'width'.*unknown fields .'widht'"):
        ActivationStore.open(root)
    (root / "zarr.json").write_bytes(whole.replace(b'"schema_version": 2', b'"schema_version": 3'))
    with pytest.raises(StoreSchemaError, match="version 3"):
        ActivationStore.open(root)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [11, 6]),
        ("data_type", "uint16"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [5, 6]}}),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]),
    ],
)
def test_arrays_that_differ_from_the_manifest(root: Path, field: str, value: object) -> None:
    path = root / "diff/5/zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(StoreDamagedError, match=f"array diff/5 is damaged: its {field}"):
        ActivationStore.open(root)


def test_a_missing_array(root: Path) -> None:
    (root / "norm/2/zarr.json").unlink()
    with pytest.raises(StoreDamagedError, match="array norm/2"):
        ActivationStore.open(root)
