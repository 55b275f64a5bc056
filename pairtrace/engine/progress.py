"""How long work reports itself: stages announce totals and advance; the front door draws the bar."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one stage after another. Library code never draws anything itself."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """Begin `stage`, which has `total` units of work (`None` when unknown), counted in `unit`."""

    def advance(self, done: int, **figures: float) -> None:
        """Report `done` more units; `figures` are running totals worth showing (for example tokens)."""

    def finish(self) -> None:
        """End the stage."""


class _NullProgress:
    """Discards every report."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, done: int, **figures: float) -> None:
        pass

    def finish(self) -> None:
        pass


NULL_PROGRESS: Progress = _NullProgress()
