"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMo 2 with a tokenizer, fresh for each module."""
    path = tmp_path_factory.mktemp("m0")
    make_tokenizer(path)
    return make_model("olmo2", path)
