"""Tables of rows, whatever kind of file they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

HASH_BLOCK = 1 << 20
BATCH_ROWS = 1024
"""Rows decoded at a time: bounds the memory of a reader."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row whose bytes cannot be decoded, with the reason."""

    reason: str


Record = dict[str, Any] | Unreadable


class Table(Protocol):
    """Rows that can be read in order from any row on, in bounded memory."""

    @property
    def name(self) -> str:
        """Name for messages, and the source of its rows where several tables make up the data."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def block_starts(self) -> Sequence[int]:
        """Ascending rows, the first 0, at which reading can begin without decoding what comes before."""

    def digest(self) -> str:
        """SHA-256 of the content, in hex."""

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The rows from `start` up to `stop`, with at least the given columns of those that a row has."""


def file_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of files, in order, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
    return digest.hexdigest()
