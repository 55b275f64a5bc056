"""Finished work of a run that is under way, one JSON object per line, so that an interruption costs little of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError
from pairtrace.store.lock import give_lock_back, take_lock

_ADVICE = "repeat the settings that it was made with, choose another output, or delete the file"
# What a setting was before there was a choice: such runs say nothing of it.
_UNSAID = {"backend": "hf"}


def require_same_run(expected: Mapping[str, Any], actual: Any, path: Path, *, exact: bool = True) -> None:
    """Check that the file at `path` belongs to the run described by `expected`.

    Args:
        expected: what the run would write.
        actual: what the file says.
        path: of the file.
        exact: a setting that only the file has is a difference as well.

    Raises:
        DataMismatchError: names the first setting that differs, with both values.
    """
    if not isinstance(actual, dict):
        raise DataMismatchError(f"{path} exists, but does not say how it was made; {_ADVICE}")
    only_there = [name for name in actual if name not in expected] if exact else []
    for name in (*expected, *only_there):
        if actual.get(name) != expected.get(name):
            there, here = (settings.get(name, _UNSAID.get(name)) for settings in (actual, expected))
            raise DataMismatchError(f"{path} was made with {name} {there!r}, but this run asks for {here!r}; {_ADVICE}")


class Journal:
    """Entries on disk; the first line says what run they belong to.

    Args:
        path: the file; made with the directories above it, and locked: only one run at a time writes to it.
        identity: of the run, plain JSON values. A file of another run is refused.
        sync_seconds: entries are made durable at least this far apart; a killed process loses none of them, only a
            power cut may cost the last ones. 0 makes every entry durable before `append` returns.

    Attributes:
        entries: what the file held when it was opened.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, sync_seconds: float = 0.0) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._identity = dict(identity)
        self._sync_seconds = sync_seconds

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error}") from error
        with ExitStack() as undo:
            undo.callback(self._close)
            self._lock()
            self._read()
            undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _read(self) -> None:
        self._file.seek(0)
        valid = 0
        for number, (line, entry) in enumerate(self._lines()):
            if number == 0:
                require_same_run(self._identity, entry.get("identity"), self.path)
            else:
                self.entries.append(entry)
            valid += len(line)
        # A line that a kill cut short is written again.
        self._file.truncate(valid)
        self._synced = -float("inf")
        if valid == 0:
            self.append([{"identity": self._identity}])

    def _lock(self) -> None:
        """Two runs that write to one file would cut off each other's lines."""
        try:
            take_lock(self._file.fileno(), self.path)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing to {self.path}; wait for it to finish, or choose another output"
            ) from error
        except OSError as error:
            raise ConfigError(f"cannot lock {self.path}: {error}") from error

    def _close(self) -> None:
        give_lock_back(self._file.fileno())
        self._file.close()

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add entries; they outlive this process when this returns.

        Raises:
            ConfigError: the file cannot be written.
        """
        try:
            self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            self._file.flush()
            if time.monotonic() - self._synced >= self._sync_seconds:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error}; check the free space") from error

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The complete lines, and what they say."""
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataFormatError(f"{self.path} is damaged ({error}); delete it to start again") from error
            if not isinstance(entry, dict):
                raise DataFormatError(f"{self.path} is damaged (a line is no JSON object); delete it to start again")
            yield line, entry
