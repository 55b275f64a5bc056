"""Shards that other processes stage and the holder of the lock commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pairtrace.errors import StoreError, StoreWriteError
from pairtrace.store import writer as writer_module
from pairtrace.store.location import PARTIAL, LocalLocation, open_location
from pairtrace.store.metadata import has_rows
from pairtrace.store.reader import ActivationStore
from pairtrace.store.staging import ShardStager, leave_probe, place, sees_probe
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.store.crashes import Crash, crash_on_nth, record_durability
from tests.store.samples import make_block, make_manifest, tree_bytes, write_store


def partial_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob(f"*{PARTIAL}"))


def commit_all(path: Path | str, manifest: Any, *, fsync: bool = False) -> None:
    with StoreWriter.create_or_resume(path, manifest, fsync=fsync) as writer:
        stager = ShardStager(path, manifest, leave_probe(path), fsync=fsync)
        for shard in writer.missing_shards():
            writer.commit(stager.stage(make_block(manifest, shard)))
        writer.discard_staged()


@pytest.mark.parametrize("changes", [{}, {"sides": True, "codec": "zstd:3"}, {"dtype": "int8"}], ids=str)
def test_a_committed_store_has_the_bytes_of_a_written_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = make_manifest(**changes)
    write_store(tmp_path / "written", manifest)
    commit_all(tmp_path / "staged", manifest)
    assert tree_bytes(tmp_path / "staged") == tree_bytes(tmp_path / "written")
    assert verify(tmp_path / "staged").ok


def test_what_is_staged_is_not_there_until_it_is_committed(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest, fsync=False) as writer:
        stager = ShardStager(tmp_path, manifest, leave_probe(tmp_path), fsync=False)
        staged = stager.stage(make_block(manifest, 1))
        assert writer.missing_shards() == [0, 1, 2] and not has_rows(LocalLocation(tmp_path))
        assert all(name.endswith(PARTIAL) for name in (path.name for path in tmp_path.glob("diff/2/c/1/*")))
        writer.commit(staged)
        assert writer.missing_shards() == [0, 2]
    assert len(partial_files(tmp_path)) == 1, "the probe"


def test_of_two_attempts_one_is_committed_whole(tmp_path: Path) -> None:
    """Two workers at the same shard, each sure of its own: nothing of the other's gets in, before or after."""
    manifest = make_manifest(sides=True)
    write_store(tmp_path / "two", manifest, [0], seed=1)
    root = tmp_path / "both"
    with StoreWriter.create_or_resume(root, manifest, fsync=False) as writer:
        stager = ShardStager(root, manifest, leave_probe(root), fsync=False)
        attempts = [stager.stage(make_block(manifest, 0, seed)) for seed in (0, 1)]
        writer.commit(attempts[1])
        assert len(partial_files(root)) == 13 + 1
        late = stager.stage(make_block(manifest, 0))
        writer.discard_staged()
        assert tree_bytes(root) == tree_bytes(tmp_path / "two")
        for gone in (attempts[0], late):
            with pytest.raises(StoreWriteError, match="cannot commit shard 0"):
                writer.commit(gone)


def test_leftovers_of_a_killed_run_do_not_survive_the_next_writer(tmp_path: Path) -> None:
    manifest = make_manifest()
    StoreWriter.create_or_resume(tmp_path, manifest, fsync=False).close()
    stager = ShardStager(tmp_path, manifest, leave_probe(tmp_path), fsync=False)
    stager.stage(make_block(manifest, 2, seed=7))
    write_store(tmp_path, manifest)
    with pytest.raises(StoreError, match="the run that shard 1 belongs to has ended"):
        stager.stage(make_block(manifest, 1, seed=7))
    assert not partial_files(tmp_path)
    assert verify(tmp_path).ok


def marks_first(location: Any, keys: list[str], attempt: str, **options: Any) -> None:
    """The mutation: the mark before the arrays."""
    if keys[0].startswith("status"):
        return
    place(location, [f"status/c/{keys[0].split('/c/')[1].split('/')[0]}"], attempt, **options)
    place(location, keys, attempt, **options)


def commit_with_crashes(root: Path, reference: dict[str, bytes]) -> None:
    """Crash before each rename of a commit; a shard that is marked then must be whole."""
    manifest = make_manifest()
    for step in range(1, 20):
        path = root / str(step)
        writer = StoreWriter.create_or_resume(path, manifest, fsync=False)
        staged = ShardStager(path, manifest, leave_probe(path), fsync=False).stage(make_block(manifest, 0))
        with pytest.MonkeyPatch.context() as patch:
            crash_on_nth(patch, Path, "replace", step)
            try:
                writer.commit(staged)
            except Crash:
                finished = False
            else:
                finished = True
        writer.close()
        store = ActivationStore.open(path, allow_incomplete=True)
        marked = bool(store.status()[0])
        assert marked or not finished
        if marked:
            assert {name: tree_bytes(path).get(name) for name in reference} == reference
        write_store(path, manifest)
        assert verify(path).ok
        if finished:
            return
    raise AssertionError("the commit never finished")


def shard_reference(root: Path) -> dict[str, bytes]:
    write_store(root, make_manifest(), [0])
    return tree_bytes(root)


def test_a_crash_within_a_commit_leaves_the_shard_unmarked(tmp_path: Path) -> None:
    commit_with_crashes(tmp_path, shard_reference(tmp_path / "reference"))


def test_the_crash_test_notices_a_mark_that_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "place", marks_first)
    with pytest.raises(AssertionError):
        commit_with_crashes(tmp_path, shard_reference(tmp_path / "reference"))


def test_arrays_are_durable_before_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        stager = ShardStager(tmp_path, manifest, leave_probe(tmp_path))
        events = record_durability(monkeypatch)
        staged = stager.stage(make_block(manifest, 0))
        writer.commit(staged)
    places = [place for kind, place in events if kind == "rename" and not place.endswith(PARTIAL)]
    assert places[-1].endswith("status/c/0") and len(places) == 9
    mark = events.index(("rename", places[-1]))
    for path in places[:-1]:
        # The bytes under their staged name, then the rename by its directory; both before the mark.
        renamed = events.index(("rename", path))
        assert any(kind == "fsync" and name.startswith(f"{path}.") for kind, name in events[:renamed])
        assert ("fsync", str(Path(path).parent)) in events[renamed:mark]
    assert ("fsync", str(tmp_path / "status/c")) in events[mark:]


def test_a_damaged_shard_loses_its_mark_before_it_is_made_again(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_store(tmp_path, manifest)
    (tmp_path / "norm/2/c/1").unlink()
    with StoreWriter.create_or_resume(tmp_path, manifest, fsync=False) as writer:
        missing = writer.missing_shards()
        writer.unmark(missing)
        assert missing == [1] and not (tmp_path / "status/c/1").exists()
    commit_all(tmp_path, manifest)
    assert verify(tmp_path).ok


def test_an_object_store_gets_its_mark_last_as_well(tmp_path: Path) -> None:
    address, manifest = f"memory://{tmp_path.name}/staged.zarr", make_manifest(sides=True)
    with StoreWriter.create_or_resume(address, manifest) as writer:
        stager = ShardStager(address, manifest, leave_probe(address))
        staged = stager.stage(make_block(manifest, 0))
        assert writer.missing_shards() == [0, 1, 2]
        writer.commit(staged)
        with pytest.raises(StoreWriteError, match=r"cannot commit shard 0: .*is not there"):
            writer.commit(staged)
        writer.commit(stager.stage(make_block(manifest, 0)))
        assert writer.missing_shards() == [1, 2]
        stager.stage(make_block(manifest, 1))
        writer.discard_staged()
        assert not [key for key in open_location(address).list_keys() if key.endswith(PARTIAL)]
    commit_all(address, manifest)
    assert verify(address).ok


def test_a_probe_shows_which_place_is_meant(tmp_path: Path) -> None:
    write_store(tmp_path / "a", make_manifest())
    write_store(tmp_path / "copy", make_manifest())
    probe = leave_probe(tmp_path / "a")
    assert sees_probe(tmp_path / "a", probe) and not sees_probe(tmp_path / "copy", probe)
    assert ActivationStore.open(tmp_path / "a").status().all()
