"""Reading preference pairs."""

from __future__ import annotations

from pairtrace.engine.pair import Pair

__all__ = ["Pair"]
