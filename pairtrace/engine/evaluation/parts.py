"""What an interrupted evaluation goes on with: a journal for each stage and model, named after what decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pairtrace.engine.journal import Journal

_SYNC_SECONDS = 5.0


class Part:
    """Finished entries of one stage.

    Attributes:
        entries: what is known, in the order in which it was found out.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self.entries: list[dict[str, Any]] = [] if journal is None else list(journal.entries)

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep more entries; they outlive this process."""
        new = [dict(entry) for entry in entries]
        self.entries += new
        if self._journal is not None:
            self._journal.append(new)


@contextmanager
def open_part(folder: Path | None, stage: str, identity: Mapping[str, Any]) -> Iterator[Part]:
    """The entries of a stage; those of other settings lie in files of their own.

    Args:
        folder: of the journals; None keeps nothing.
        stage: what is kept.
        identity: everything that decides the entries, plain JSON values.

    Raises:
        ConfigError: the journal cannot be written.
        DataFormatError: it is damaged.
    """
    if folder is None:
        yield Part(None)
        return
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    with Journal(folder / f"{stage}-{digest}.jsonl", identity, sync_seconds=_SYNC_SECONDS) as journal:
        yield Part(journal)
