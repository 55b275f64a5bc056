from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import (
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreMismatchError,
    StoreSchemaError,
    StoreWriteError,
)
from pairtrace.store import metadata
from pairtrace.store.location import LocalLocation
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import ShardBlock, StoreWriter
from tests.store.samples import chunk_files, make_block, make_manifest, shard_count, tree_bytes, write_store
from tests.store.test_manifest import OTHER


class Crash(BaseException):
    """Stands for the end of the process at this instant."""


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
    value["attributes"]["pairtrace"]["schema_version"] = 2
    path.write_text(json.dumps(value))
    with pytest.raises(StoreSchemaError):
        StoreWriter.create_or_resume(tmp_path, make_manifest())


# What is in the way


def test_nothing_that_is_no_store_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    foreign = tmp_path / "foreign.zarr"
    foreign.mkdir()
    (foreign / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    before = tree_bytes(tmp_path)
    for path in (folder, file, foreign):
        with pytest.raises(StoreError, match="another --store path"):
            StoreWriter.create_or_resume(path, make_manifest())
    assert tree_bytes(tmp_path) == before
    assert not (folder / "status").exists()


def test_a_store_that_lost_its_manifest_is_not_recreated(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest())
    (tmp_path / "zarr.json").unlink()
    before = tree_bytes(tmp_path)
    with pytest.raises(StoreDamagedError, match="no manifest"):
        StoreWriter.create_or_resume(tmp_path, make_manifest())
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize("made_of", ["empty", "nested empty"])
def test_an_empty_directory_becomes_the_store(tmp_path: Path, made_of: str) -> None:
    if made_of == "nested empty":
        (tmp_path / "status").mkdir()
    write_store(tmp_path, make_manifest())
    ActivationStore.open(tmp_path)


# Interrupted creation


def crash_on_nth(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, n: int) -> Callable[[], int]:
    """Make the n-th call of a function the end of the process, just before it acts."""
    original = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return lambda: calls


@pytest.mark.parametrize(("owner", "name", "steps"), [(Path, "replace", 11), (os, "link", 13)])
def test_creation_interrupted_at_every_step_starts_over(tmp_path: Path, owner: Any, name: str, steps: int) -> None:
    """Every file that creation makes gets its name in one of these two ways; crash before each in turn.

    The settings change after the crash: leftovers of the first run must not show in the second.
    """
    second = make_manifest(sides=True, width=9)
    write_store(tmp_path / "reference", second)
    reference = tree_bytes(tmp_path / "reference")
    crashes = 0
    for step in range(1, 100):
        root = tmp_path / str(step)
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_on_nth(patch, owner, name, step)
            try:
                StoreWriter.create_or_resume(root, make_manifest(), fsync=False).close()
            except Crash:
                crashes += 1
            else:
                assert calls() == step - 1
                break
        with pytest.raises(StoreError):
            ActivationStore.open(root)
        write_store(root, second)
        assert tree_bytes(root) == reference
    assert crashes == steps


def test_a_manifest_that_a_power_cut_left_empty_starts_over(tmp_path: Path) -> None:
    StoreWriter.create_or_resume(tmp_path, make_manifest()).close()
    (tmp_path / "zarr.json").write_bytes(b"")
    with pytest.raises(StoreDamagedError):
        ActivationStore.open(tmp_path)
    write_store(tmp_path, make_manifest())
    ActivationStore.open(tmp_path)


# The mark


class MarksFirst(StoreWriter):
    """The mutation: the mark before the data."""

    def write_shard(self, block: ShardBlock) -> None:
        values = self._values(block)
        self._put(block.index, {"status": values.pop("status")})
        self._put(block.index, values)


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


def record_durability(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Log fsyncs by path, and renames by target."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(handle: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def logged_replace(self: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    return events


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
    assert ("fsync", str(root / "status" / "c" / f"{shard}.partial")) in events[mark - 1 : mark]
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


def test_creation_is_durable_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "acts.zarr"
    events = record_durability(monkeypatch)
    StoreWriter.create_or_resume(root, make_manifest()).close()
    manifest = max(i for i, event in enumerate(events) if event == ("rename", str(root / "zarr.json")))
    for name in ("status", "diff", "diff/2", "norm/5", "source"):
        assert ("fsync", str(root / name / "zarr.json")) in events[:manifest]
        assert ("fsync", str(root / name)) in events[:manifest]
    for path in (root / "zarr.json", root, tmp_path):
        assert ("fsync", str(path)) in events[manifest:]


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
        with pytest.raises(Crash):
            writer.write_shard(make_block(manifest, 1, seed=9))
        assert writer.missing_shards() == [1]


# One writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
            StoreWriter.create_or_resume(tmp_path, manifest)
        writer.write_shard(make_block(manifest, 0))
    StoreWriter.create_or_resume(tmp_path, manifest).close()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    manifest = make_manifest()
    StoreWriter.create_or_resume(tmp_path, manifest).close()
    code = (
        "import sys, time; from pathlib import Path; from pairtrace.store.lock import WriterLock;"
        "lock = WriterLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreLockedError, match=f"process {other.pid}"):
            StoreWriter.create_or_resume(tmp_path, manifest)
        other.send_signal(signal.SIGKILL)
        other.wait()
        StoreWriter.create_or_resume(tmp_path, manifest).close()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        write_store(tmp_path, make_manifest())
    assert "only one writer" in caplog.text
    ActivationStore.open(tmp_path)


def test_readers_are_not_locked_out(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        writer.write_shard(make_block(manifest, 0))
        assert ActivationStore.open(tmp_path, allow_incomplete=True).status()[:4].all()


# Places that cannot be written


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_operating_system_errors_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Injected: the tests may run as root, whom permissions do not stop."""
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        monkeypatch.setattr(LocalLocation, "write", fail)
        with pytest.raises(StoreWriteError, match=words) as caught:
            writer.write_shard(make_block(manifest, 1))
    message = str(caught.value)
    assert str(tmp_path) in message and "shard 1 (rows 4 to 7)" in message and "run the same command again" in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_where_nothing_can_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(metadata, "create_arrays", fail)
    with pytest.raises(StoreWriteError, match="cannot create or open the store"):
        StoreWriter.create_or_resume(tmp_path / "a", make_manifest())
    monkeypatch.undo()
    write_store(tmp_path / "a", make_manifest())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreWriteError, match="permission denied"):
        StoreWriter.create_or_resume(tmp_path / "a", make_manifest())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("key", ["diff/5/c/1/0", "status/c/1"])
def test_a_full_disk(tmp_path: Path, key: str) -> None:
    """The kernel's own ENOSPC, from /dev/full in the place of the half-written file."""
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        target = tmp_path / f"{key}.partial"
        target.parent.mkdir(exist_ok=True)
        target.symlink_to("/dev/full")
        with pytest.raises(StoreWriteError, match=r"disk is full.*shard is safe"):
            writer.write_shard(make_block(manifest, 1))
        assert writer.missing_shards() == [1, 2]
        assert not list(tmp_path.rglob("*.partial"))
        writer.write_shard(make_block(manifest, 1))
        assert writer.missing_shards() == [2]


def test_a_file_size_limit(tmp_path: Path) -> None:
    """The kernel's own EFBIG: half of the chunk is written when it strikes."""
    manifest = make_manifest(width=20_000, rows=8)
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StoreWriteError, match="size limit"):
                writer.write_shard(make_block(manifest, 0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert writer.missing_shards() == [0, 1]
    assert not list(tmp_path.rglob("*.partial"))


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
