"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.training.cases import rows, run, write_rows
from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMo 2 of two blocks."""
    path = tmp_path_factory.mktemp("small")
    make_tokenizer(path)
    return make_model("olmo2", path, num_hidden_layers=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows())


@pytest.fixture(scope="session")
def trained(small: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint after two epochs: six steps without an interruption."""
    out = tmp_path_factory.mktemp("trained") / "m1"
    run(small, data, out, epochs=2)
    return out
