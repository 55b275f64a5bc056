from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.errors import ConfigError, StoreDamagedError
from pairtrace.store.location import LocalLocation
from pairtrace.store.read_ahead import ahead
from pairtrace.store.reader import ActivationStore
from tests.store.samples import expected_arrays, make_manifest, write_store

PLACES = ["local", "local:zstd:1", "memory"]


class Loaded:
    """A result that can be counted while it is alive."""

    def __init__(self, item: int) -> None:
        self.item = item


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pairtrace-read-ahead")]


@pytest.fixture(autouse=True)
def every_thread_ends() -> Iterator[None]:
    yield
    assert own_threads() == []


@pytest.mark.parametrize("count", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_are_bounded(count: int, threads: int) -> None:
    alive: weakref.WeakSet[Loaded] = weakref.WeakSet()
    most = 0

    def load(item: int) -> Loaded:
        nonlocal most
        time.sleep(0.001 * (item % 3))
        result = Loaded(item)
        alive.add(result)
        most = max(most, len(alive))
        return result

    seen = []
    for item, result in ahead(range(20), load, count=count, threads=threads):
        assert result.item == item
        time.sleep(0.001)
        seen.append(item)
        del result
    assert seen == list(range(20))
    gc.collect()
    assert len(alive) == 0
    assert most <= count + 1


def furthest_loaded(window: Callable[..., Any], count: int) -> int:
    """Largest item that was begun while the consumer works on item 3."""
    asked: list[int] = []
    work = window(range(100), asked.append, count=count, threads=2)
    assert asked == []
    for _ in range(4):
        next(work)
    time.sleep(0.05)
    work.close()
    return max(asked)


def test_nothing_is_loaded_beyond_the_window() -> None:
    assert furthest_loaded(ahead, 3) == 6
    # What the test must notice: a window of another size.
    assert furthest_loaded(lambda *args, count, threads: ahead(*args, count=count + 1, threads=threads), 3) == 7


@pytest.mark.parametrize("count", [0, 1, 4])
def test_an_error_is_raised_in_its_place(count: int) -> None:
    def load(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    seen = []
    with pytest.raises(ValueError, match="five"):
        seen.extend(item for item, _ in ahead(range(20), load, count=count, threads=2))
    assert seen == [0, 1, 2, 3, 4]


def test_threads_end_when_the_iterator_is_abandoned() -> None:
    work = ahead(range(20), lambda item: item, count=3, threads=2)
    next(work)
    assert own_threads()
    del work
    gc.collect()
    assert own_threads() == []


# The store


def make_store(place: str, tmp_path: Path, **changes: Any) -> str:
    kind, _, codec = place.partition(":")
    root = str(tmp_path / "acts.zarr") if kind == "local" else f"memory://{tmp_path.name}/acts.zarr"
    write_store(root, make_manifest(rows=30, codec=codec or "none", **changes))
    return root


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read_ahead", [0, 1, 2, 50])
def test_read_ahead_changes_nothing(tmp_path: Path, place: str, read_ahead: int) -> None:
    store = ActivationStore.open(make_store(place, tmp_path))
    whole = expected_arrays(store.manifest)["diff/5"]
    for block_rows in (None, 3):
        blocks = list(store.blocks(5, block_rows=block_rows, read_ahead=read_ahead))
        assert [start for start, _ in blocks] == sorted(start for start, _ in blocks)
        joined = np.concatenate([np.asarray(rows) for _, rows in blocks])
        np.testing.assert_array_equal(joined, whole)


@pytest.mark.parametrize("place", PLACES)
def test_an_abandoned_pass_over_a_store_leaves_no_thread(tmp_path: Path, place: str) -> None:
    blocks = ActivationStore.open(make_store(place, tmp_path)).blocks(5)
    next(blocks)
    del blocks
    gc.collect()
    assert own_threads() == []


def test_a_negative_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="read_ahead must not be negative, but is -1"):
        ActivationStore.open(make_store("local", tmp_path)).blocks(5, read_ahead=-1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("place", ["local", "local:zstd:1", "local:blosc-lz4:5"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_a_damaged_shard_is_named_where_it_stands(
    tmp_path: Path, place: str, dtype: str, harm: Callable[[Path], None]
) -> None:
    root = make_store(place, tmp_path, dtype=dtype)
    harm(Path(root) / "diff/5/c/4/0")
    for read_ahead in (0, 2, 50):
        seen = []
        with pytest.raises(StoreDamagedError, match=r"array diff/5, shard 4 \(rows 16 to 19\)"):
            seen.extend(start for start, _ in ActivationStore.open(root).blocks(5, read_ahead=read_ahead))
        assert seen == [0, 4, 8, 12]


def test_the_disk_is_asked_for_the_next_shards_of_a_mapped_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(LocalLocation, "prefetch", lambda self, key: asked.append(key))
    monkeypatch.setattr(LocalLocation, "is_cached", lambda self, key: key == "diff/5/c/1/0")
    blocks = ActivationStore.open(make_store("local", tmp_path)).blocks(5, read_ahead=2)
    next(blocks)
    next(blocks)
    time.sleep(0.05)
    blocks.close()  # type: ignore[attr-defined]
    assert asked == [f"diff/5/c/{shard}/0" for shard in (0, 2, 3)]


def test_what_is_in_the_page_cache_is_seen(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    (tmp_path / "big").write_bytes(bytes(1 << 20))
    assert location.is_cached("big")
    with (tmp_path / "big").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not location.is_cached("absent")
    if location.is_cached("big"):
        pytest.skip("this file system keeps its pages")
    location.prefetch("big")
    deadline = time.monotonic() + 30
    while not location.is_cached("big"):
        assert time.monotonic() < deadline, "the pages that were asked for never came"
        time.sleep(0.01)


def test_asking_for_pages_never_fails(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    location.prefetch("absent/0")
    (tmp_path / "empty").write_bytes(b"")
    location.prefetch("empty")
