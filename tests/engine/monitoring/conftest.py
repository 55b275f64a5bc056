"""Fixtures of the tests of the monitor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.monitoring.cases import write_checkpoint, write_prompts
from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="session")
def m0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMo 2 of two blocks."""
    path = tmp_path_factory.mktemp("m0")
    make_tokenizer(path)
    return make_model("olmo2", path, num_hidden_layers=2)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts, one of them with a distractor: thirteen items."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "bag.jsonl")


@pytest.fixture(scope="session")
def checkpoints(m0: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run: M0 itself at step 10, and others at 20 and 30."""
    path = tmp_path_factory.mktemp("run")
    for step, scale in ((10, 0.0), (20, 0.02), (30, 0.2)):
        write_checkpoint(m0, path / f"checkpoint-{step}", scale)
    return path
