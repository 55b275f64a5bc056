"""Fixtures of the tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.finetuning.cases import probes_of, prompts, responses, run, write_probes, write_rows
from tests.models import make_model, make_tokenizer


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMo 2 of two blocks."""
    path = tmp_path_factory.mktemp("small")
    make_tokenizer(path)
    return make_model("olmo2", path, num_hidden_layers=2)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 given responses."""
    return write_rows(tmp_path_factory.mktemp("data") / "responses.jsonl", responses())


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts."""
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", prompts())


@pytest.fixture(scope="session")
def probe(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble and a held-out probe at both layers, layer 1 being the best."""
    return write_probes(tmp_path_factory.mktemp("probe") / "harm.safetensors", probes_of(small), best_layer=1)


@pytest.fixture(scope="session")
def plain(small: Path, given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint after two epochs of plain fine-tuning: six steps."""
    out = tmp_path_factory.mktemp("plain") / "m1"
    run(small, given, out, method="sft", signal="none", epochs=2)
    return out


@pytest.fixture(scope="session")
def against(small: Path, given: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same against the probe of layer 1, at weight 2."""
    out = tmp_path_factory.mktemp("against") / "m1"
    run(small, given, out, method="sft", probe=str(probe), probe_weight=2.0, epochs=2)
    return out
