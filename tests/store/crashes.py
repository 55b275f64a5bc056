"""The end of the process at a chosen instant, and a log of what was made durable when."""

from __future__ import annotations

import itertools
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairtrace.errors import StoreError
from pairtrace.store.manifest import Manifest
from pairtrace.store.reader import ActivationStore
from tests.store.samples import shard_count, tree_bytes


class Crash(BaseException):
    """Stands for the end of the process at this instant."""


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


def dies_at_nth(owner: Any, name: str, n: int, action: Callable[[], object]) -> bool:
    """Run an action in a child process that ends at its n-th call of a function, just before the call acts.

    A process of its own, since Zarr creates arrays in threads: after an exception in one of them the others
    would go on writing, as they do not when a process ends.

    Returns:
        Whether the action came to the n-th call.
    """
    died, finished, failed = 70, 0, 71
    child = os.fork()
    if child == 0:
        original, lock, calls = getattr(owner, name), threading.Lock(), itertools.count(1)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if next(calls) == n:
                    os._exit(died)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        code = failed
        try:
            action()
            code = finished
        finally:
            if code == failed:
                traceback.print_exc()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (died, finished), f"the child process ended with {code}"
    return code == died


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


def assert_marked_shards_are_whole(root: Path, manifest: Manifest, reference: dict[str, bytes]) -> list[int]:
    """The marked shards, after a look at every one of their files."""
    try:
        store = ActivationStore.open(root, allow_incomplete=True)
    except StoreError:  # killed while it was created: nothing can be marked
        assert not (root / "status" / "c").exists()
        return []
    marked = [shard for shard in range(shard_count(manifest)) if store.status()[manifest.shard_rows * shard] != 0]
    present = tree_bytes(root)
    for name, content in reference.items():
        parts = Path(name).parts
        if "c" in parts and int(parts[parts.index("c") + 1]) in marked:
            assert present.get(name) == content, name
    return marked
