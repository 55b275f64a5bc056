"""Finished rollouts of a run that is under way, so that an interruption costs one batch at most."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtrace.engine.journal import Journal

if TYPE_CHECKING:
    from pairtrace.engine.sampling import Sampled

logger = logging.getLogger(__name__)

Key = tuple[str, str, str, int]  # model, condition, prompt id, sample


class RolloutJournal:
    """Finished rollouts on disk; a file of another run is refused.

    Attributes:
        path: the file.
        rows: what is known of every finished rollout (`response`, `tokens`, `finished`).
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._journal = Journal(path, identity)

    def __enter__(self) -> RolloutJournal:
        self._journal.__enter__()
        for entry in self._journal.entries:
            model, condition, identifier, sample = entry.pop("key")
            self.rows[model, condition, identifier, sample] = entry
        if self.rows:
            logger.info("%s: going on after %d finished rollouts", self.path, len(self.rows))
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.__exit__(*error)

    def append(self, finished: list[tuple[Key, Sampled]]) -> None:
        """Keep one batch; it is on disk when this returns."""
        entries = []
        for key, sampled in finished:
            self.rows[key] = asdict(sampled)
            entries.append({"key": list(key), **self.rows[key]})
        self._journal.append(entries)
