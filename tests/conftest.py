"""What every test leaves as it found it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets up logging for its process, here for one test."""
    root, package = logging.getLogger(), logging.getLogger("pairtrace")
    handlers, levels = list(root.handlers), (root.level, package.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])
