from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from pairtrace.errors import StoreDamagedError, StoreError, StoreLockedError, StoreMismatchError
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.store.crashes import Crash, crash_on_nth, dies_at_nth, record_durability
from tests.store.samples import chunk_files, make_block, make_manifest, tree_bytes, write_store

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
        with pytest.raises(StoreError, match="choose another path"):
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
        if not dies_at_nth(
            owner,
            name,
            step,
            lambda root=root: StoreWriter.create_or_resume(root, make_manifest(), fsync=False).close(),
        ):
            break
        crashes += 1
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


# A store in which nothing is finished


OTHER_SETTINGS = make_manifest(sides=True, width=9, layers=(3,), model_fingerprint="e" * 64)


def begin(root: Path) -> None:
    """A run that died before its first mark, with chunks and half-written files of shard 0 behind it."""
    with StoreWriter.create_or_resume(root, make_manifest(), fsync=False) as writer, pytest.MonkeyPatch.context() as p:
        crash_on_nth(p, Path, "replace", 5)
        writer.write_shard(make_block(make_manifest(), 0))
        with pytest.raises(Crash):
            writer.flush()
    assert chunk_files(root) and list(root.rglob("*.partial"))


def test_an_empty_store_takes_other_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "acts.zarr"
    begin(root)
    with caplog.at_level(logging.WARNING), StoreWriter.create_or_resume(root, OTHER_SETTINGS) as writer:
        assert writer.created and writer.manifest == OTHER_SETTINGS and writer.missing_shards() == [0, 1, 2]
        assert "another model_fingerprint" in caplog.text and str(root) in caplog.text
        with pytest.raises(StoreLockedError):
            StoreWriter.create_or_resume(root, make_manifest())
    write_store(root, OTHER_SETTINGS)
    write_store(tmp_path / "reference", OTHER_SETTINGS)
    assert tree_bytes(root) == tree_bytes(tmp_path / "reference")
    assert not [folder for folder in root.rglob("*") if folder.is_dir() and not any(folder.iterdir())]
    assert verify(root).ok


def test_an_empty_store_of_the_same_settings_is_kept(tmp_path: Path) -> None:
    begin(tmp_path)
    with StoreWriter.create_or_resume(tmp_path, make_manifest(created="later")) as writer:
        assert not writer.created and writer.manifest == make_manifest()


@pytest.mark.parametrize("mark", ["whole", "damaged", "empty"])
def test_a_store_with_any_mark_is_not_empty(tmp_path: Path, mark: str) -> None:
    write_store(tmp_path, make_manifest(), [2])
    path = tmp_path / "status/c/2"
    path.write_bytes({"whole": path.read_bytes(), "damaged": path.read_bytes()[:-1], "empty": b""}[mark])
    before = tree_bytes(tmp_path)
    with pytest.raises(StoreMismatchError):
        StoreWriter.create_or_resume(tmp_path, OTHER_SETTINGS)
    assert tree_bytes(tmp_path) == before


def test_an_empty_store_with_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "diff" / "notes.txt").write_text("x")
    before = tree_bytes(tmp_path)
    with pytest.raises(StoreMismatchError):
        StoreWriter.create_or_resume(tmp_path, OTHER_SETTINGS)
    assert tree_bytes(tmp_path) == before


def test_an_empty_store_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    with StoreWriter.create_or_resume(tmp_path, make_manifest()):
        before = tree_bytes(tmp_path)
        with pytest.raises(StoreLockedError):
            StoreWriter.create_or_resume(tmp_path, OTHER_SETTINGS)
    assert tree_bytes(tmp_path) == before


@pytest.mark.parametrize(("owner", "name"), [(Path, "unlink"), (Path, "replace"), (os, "link"), (Path, "rmdir")])
@pytest.mark.parametrize("then", ["the old settings", "the new settings"])
def test_starting_over_can_be_interrupted_at_every_step(tmp_path: Path, owner: Any, name: str, then: str) -> None:
    after = make_manifest() if then == "the old settings" else OTHER_SETTINGS
    write_store(tmp_path / "reference", after)
    reference = tree_bytes(tmp_path / "reference")
    crashes = 0
    for step in range(1, 100):
        root = tmp_path / str(step)
        begin(root)
        if not dies_at_nth(
            owner, name, step, lambda root=root: StoreWriter.create_or_resume(root, OTHER_SETTINGS, fsync=False).close()
        ):
            break
        crashes += 1
        write_store(root, after)
        assert tree_bytes(root) == reference
    assert crashes >= 5


def test_what_is_removed_is_durably_removed_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that a power cut brings back under no manifest would look like a store that lost its manifest."""
    root = tmp_path / "acts.zarr"
    begin(root)
    chunks = [path for path in chunk_files(root) if path.suffix != ".partial"]
    events = record_durability(monkeypatch)
    unlink = Path.unlink

    def logged(self: Path, missing_ok: bool = False) -> None:
        events.append(("unlink", str(self)))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", logged)
    StoreWriter.create_or_resume(root, OTHER_SETTINGS).close()
    manifest = events.index(("unlink", str(root / "zarr.json")))
    for chunk in chunks:
        gone = events.index(("unlink", str(chunk)))
        assert gone < manifest and ("fsync", str(chunk.parent)) in events[gone:manifest]
    assert ("fsync", str(root)) in events[manifest : manifest + 3]
