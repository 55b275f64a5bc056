"""Finished rollouts of a run that is under way, so that an interruption costs one batch at most."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError

if TYPE_CHECKING:
    from pairtrace.engine.sampling import Sampled

logger = logging.getLogger(__name__)

Key = tuple[str, str, str, int]  # model, condition, prompt id, sample

_ADVICE = "repeat the settings that it was made with, choose another output, or delete the file"


def require_same_run(expected: dict[str, Any], actual: Any, path: Path) -> None:
    """Check that the file at `path` belongs to the run described by `expected`.

    Raises:
        DataMismatchError: names the first setting that differs, with both values.
    """
    if not isinstance(actual, dict):
        raise DataMismatchError(f"{path} exists, but does not say how it was made; {_ADVICE}")
    for name, value in expected.items():
        if actual.get(name) != value:
            raise DataMismatchError(
                f"{path} was made with {name} {actual.get(name)!r}, but this run asks for {value!r}; {_ADVICE}"
            )


class RolloutJournal:
    """Finished rollouts on disk, one JSON object per line; the first line says what run they belong to.

    Attributes:
        path: the file.
        rows: what is known of every finished rollout (`response`, `tokens`, `finished`).
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._identity = identity

    def __enter__(self) -> RolloutJournal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error}") from error
        self._file.seek(0)
        valid = 0
        for number, line in enumerate(self._lines()):
            entry = json.loads(line)
            if number == 0:
                require_same_run(self._identity, entry.get("identity"), self.path)
            else:
                model, condition, identifier, sample = entry.pop("key")
                self.rows[model, condition, identifier, sample] = entry
            valid += len(line)
        # A line that a kill cut short is written again.
        self._file.truncate(valid)
        if valid == 0:
            self._write([{"identity": self._identity}])
        elif self.rows:
            logger.info("%s: going on after %d finished rollouts", self.path, len(self.rows))
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, finished: list[tuple[Key, Sampled]]) -> None:
        """Keep one batch; it is on disk when this returns."""
        entries = []
        for key, sampled in finished:
            self.rows[key] = asdict(sampled)
            entries.append({"key": list(key), **self.rows[key]})
        self._write(entries)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        try:
            self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error}; check the free space") from error

    def _lines(self) -> Iterator[bytes]:
        """The complete, readable lines."""
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            try:
                json.loads(line)
            except ValueError as error:
                raise DataFormatError(f"{self.path} is damaged ({error}); delete it to start again") from error
            yield line
