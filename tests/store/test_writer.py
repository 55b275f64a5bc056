from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import (
    StoreDamagedError,
    StoreMismatchError,
    StoreSchemaError,
)
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import ShardBlock, StoreWriter
from tests.store.crashes import (
    Crash,
    assert_marked_shards_are_whole,
    crash_on_nth,
    dies_at_nth,
    record_durability,
)
from tests.store.samples import chunk_files, make_block, make_manifest, shard_count, tree_bytes, write_store
from tests.store.test_manifest import OTHER


def test_create_write_resume_and_no_op(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path / "a", manifest) as writer:
        assert writer.created and writer.missing_shards() == [0, 1, 2]
        writer.write_shard(make_block(manifest, 2))
        assert writer.missing_shards() == [0, 1]
    with StoreWriter.create_or_resume(tmp_path / "a", manifest) as writer:
        assert not writer.created and writer.missing_shards() == [0, 1]
        for shard in (1, 0):
            writer.write_shard(make_block(manifest, shard))
    write_store(tmp_path / "b", manifest)
    whole = tree_bytes(tmp_path / "a")
    assert whole == tree_bytes(tmp_path / "b")
    with StoreWriter.create_or_resume(tmp_path / "a", manifest) as writer:
        assert writer.missing_shards() == []
    assert tree_bytes(tmp_path / "a") == whole


def test_a_resumed_store_keeps_its_own_shards_and_description(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])
    with StoreWriter.create_or_resume(tmp_path, make_manifest(shard_rows=3, created="later")) as writer:
        assert writer.manifest == manifest
        assert writer.missing_shards() == [1, 2]


@pytest.mark.parametrize("field", OTHER)
def test_a_store_made_from_something_else_is_refused(tmp_path: Path, field: str) -> None:
    write_store(tmp_path, make_manifest(), [0])
    before = tree_bytes(tmp_path)
    with pytest.raises(StoreMismatchError) as caught:
        StoreWriter.create_or_resume(tmp_path, make_manifest(**{field: OTHER[field]}))
    assert caught.value.field == field
    assert tree_bytes(tmp_path) == before
    StoreWriter.create_or_resume(tmp_path, make_manifest()).close()  # the lock was let go


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest(), [0])
    path = tmp_path / "zarr.json"
    value = json.loads(path.read_text())
    value["attributes"]["pairtrace"]["schema_version"] = 3
    path.write_text(json.dumps(value))
    with pytest.raises(StoreSchemaError):
        StoreWriter.create_or_resume(tmp_path, make_manifest())


# The mark


class MarksFirst(StoreWriter):
    """The mutation: the mark before the data."""

    def _write(self, shard: int, values: dict[str, Any]) -> None:
        self._put(shard, {"status": values.pop("status")})
        self._put(shard, values)


def assert_crash_costs_only_the_shard(tmp_path: Path, kind: type[StoreWriter], steps_seen: list[int]) -> None:
    """Crash before each write and each rename of a shard; what is marked must be whole, and rows must not move."""
    manifest = make_manifest(sides=True)
    write_store(tmp_path / "reference", manifest)
    reference = tree_bytes(tmp_path / "reference")
    for step in range(1, 100):
        root = tmp_path / f"{kind.__name__}-{step}"
        write_store(root, manifest, [2])
        with pytest.MonkeyPatch.context() as patch:
            crash_on_nth(patch, Path, "replace", step)
            writer = kind.create_or_resume(root, manifest, fsync=False)
            try:
                writer.write_shard(make_block(manifest, 0))
                writer.flush()
            except Crash:
                steps_seen.append(step)
                finished = False
            else:
                finished = True
            writer.close()
        store = ActivationStore.open(root, allow_incomplete=True)
        expected = [*([1, 1, 1, 2] if finished else [0] * 4), *[0] * 4, 2, 1]
        assert store.status().tolist() == expected
        for layer in store.layers:
            for start, rows in store.blocks(layer):
                block = make_block(manifest, start // manifest.shard_rows)
                np.testing.assert_array_equal(rows, block.diff[layer])
        write_store(root, manifest)
        assert tree_bytes(root) == reference
        if finished:
            return
    raise AssertionError("the writer never finished")


def test_a_crash_at_any_write_costs_only_the_shard_in_flight(tmp_path: Path) -> None:
    steps: list[int] = []
    assert_crash_costs_only_the_shard(tmp_path, StoreWriter, steps)
    assert steps == list(range(1, 14))  # 5 arrays per pair, 4 for each of the two layers


def test_a_writer_that_marks_first_is_caught(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, StoreDamagedError)):
        assert_crash_costs_only_the_shard(tmp_path, MarksFirst, [])


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_crash_with_several_shards_under_way(tmp_path: Path, name: str) -> None:
    """The process ends before every rename and before some of the fsyncs, whichever shard they are of."""
    manifest = make_manifest(rows=18, layers=(2,))
    write_store(tmp_path / "reference", manifest)
    reference = tree_bytes(tmp_path / "reference")
    owner: Any = Path if name == "replace" else os
    crashes, marked = 0, set()
    for step in range(1, 1000, 1 if name == "replace" else 3):
        root = tmp_path / str(step)
        write_store(root, manifest, [])
        shards = list(range(4))
        if not dies_at_nth(owner, name, step, lambda: write_store(root, manifest, shards, fsync=name == "fsync")):  # noqa: B023
            break
        crashes += 1
        marked.add(tuple(assert_marked_shards_are_whole(root, manifest, reference)))
        write_store(root, manifest)
        assert tree_bytes(root) == reference
    assert crashes >= 5 and len(marked) > 2


def assert_durable_before_mark(root: Path, events: list[tuple[str, str]], shard: int) -> None:
    mark = events.index(("rename", str(root / "status" / "c" / str(shard))))
    renames = [path for kind, path in events[:mark] if kind == "rename"]
    assert len(renames) == 8
    for path in renames:
        renamed = events.index(("rename", path))
        assert ("fsync", path + ".partial") in events[:renamed], path
        folder = Path(path).parent
        while folder != root.parent:  # every directory entry on the way to the chunk
            assert ("fsync", str(folder)) in events[renamed:mark], folder
            folder = folder.parent
    made = events.index(("fsync", str(root / "status" / "c" / f"{shard}.partial")))
    assert made > max(events.index(("rename", path)) for path in renames) and made < mark
    assert ("fsync", str(root / "status" / "c")) in events[mark:]


@pytest.mark.parametrize("fsync", [True, False])
def test_everything_is_durable_before_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest, fsync=fsync) as writer:
        events = record_durability(monkeypatch)
        writer.write_shard(make_block(manifest, 1))
    if fsync:
        assert_durable_before_mark(tmp_path, events, 1)
    else:
        assert not [event for event in events if event[0] == "fsync"]
        with pytest.raises(AssertionError):
            assert_durable_before_mark(tmp_path, events, 1)


def test_leftovers_of_a_killed_writer_are_cleaned(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])
    before = tree_bytes(tmp_path)
    (tmp_path / "diff/2/c/1").mkdir()
    for name in ("diff/2/c/1/0.partial", "status/c/1.partial", "zarr.json.0f3a.partial"):
        (tmp_path / name).write_bytes(b"half")
    StoreWriter.create_or_resume(tmp_path, manifest).close()
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize("harm", ["half mark", "flipped mark", "zero mark", "no diff", "short norm", "no text"])
def test_marked_but_damaged_shards_are_computed_again(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest)
    whole = tree_bytes(tmp_path)
    mark = tmp_path / "status/c/1"
    if harm == "half mark":
        mark.write_bytes(mark.read_bytes()[:3])
    elif harm == "flipped mark":
        mark.write_bytes(b"\x03" + mark.read_bytes()[1:])
    elif harm == "zero mark":
        mark.write_bytes(bytes(4) + bytes.fromhex("48674bc7")[::-1])
    elif harm == "no diff":
        (tmp_path / "diff/5/c/1/0").unlink()
    elif harm == "short norm":
        (tmp_path / "norm/2/c/1").write_bytes(b"1234")
    else:
        (tmp_path / "reason/c/1").unlink()
    with caplog.at_level(logging.WARNING), StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        assert writer.missing_shards() == [1]
    assert "shard 1 is computed again" in caplog.text
    write_store(tmp_path, manifest)
    assert tree_bytes(tmp_path) == whole


def test_a_shard_written_again_has_no_mark_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest)
    with StoreWriter.create_or_resume(tmp_path, manifest, fsync=False) as writer:
        crash_on_nth(monkeypatch, Path, "replace", 3)
        writer.write_shard(make_block(manifest, 1, seed=9))
        with pytest.raises(Crash):
            writer.flush()
        assert writer.missing_shards() == [1]


# Invariants between the engine and the store


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {"pair_id": b.pair_id[:3]},
        lambda b: {"tokens": b.tokens.astype(np.int64)},
        lambda b: {"status": np.array([1, 1, 0, 2], np.uint8)},
        lambda b: {"reason": b.reason[:-1]},
        lambda b: {"diff": {2: b.diff[2]}},
        lambda b: {"diff": {**b.diff, 5: b.diff[5].astype(np.float32)}},
        lambda b: {"diff": {**b.diff, 5: b.diff[5].T}},
        lambda b: {"diff": {**b.diff, 5: np.full_like(b.diff[5], np.nan)}},
        lambda b: {"diff": {**b.diff, 5: np.full_like(b.diff[5], np.inf)}},
        lambda b: {"norm": {**b.norm, 5: b.norm[5].astype(np.float64)}},
        lambda b: {"chosen": b.diff, "rejected": b.diff},
        lambda b: {"pair_id": np.zeros_like(b.pair_id)},
        lambda b: {"index": 3},
        lambda b: {"index": 2},
    ],
)
def test_blocks_that_break_an_invariant_are_not_written(
    tmp_path: Path, change: Callable[[ShardBlock], dict[str, Any]]
) -> None:
    manifest = make_manifest()
    block = make_block(manifest, 0)
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        with pytest.raises(AssertionError):
            writer.write_shard(dataclasses.replace(block, **change(block)))
        assert not chunk_files(tmp_path)
        writer.write_shard(block)
    with pytest.raises(AssertionError, match="closed"):
        writer.write_shard(block)


def test_rows_need_not_be_contiguous(tmp_path: Path) -> None:
    manifest = make_manifest()
    block = make_block(manifest, 0)
    wide = {layer: np.repeat(rows, 2, axis=1)[:, ::2] for layer, rows in block.diff.items()}
    assert not wide[2].flags.c_contiguous
    with StoreWriter.create_or_resume(tmp_path / "a", manifest) as writer:
        writer.write_shard(dataclasses.replace(block, diff=wide))
    write_store(tmp_path / "b", manifest, [0])
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert shard_count(manifest) == 3
