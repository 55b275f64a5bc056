"""The end of the process at a chosen instant, and a log of what was made durable when."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
