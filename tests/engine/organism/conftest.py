from __future__ import annotations

from pathlib import Path

import pytest

from pairtrace.engine.organism import Organism, OrganismConfig, build_organism

MINIATURE = OrganismConfig(
    seed=3,
    threads=1,
    sft_examples=120,
    sft_epochs=1,
    sft_batch=16,
    preference_pairs=60,
    dpo_batch=16,
    discovery_prompts=8,
    evaluation_prompts=4,
    vocabulary=320,
    hidden=32,
    layers=2,
    heads=2,
    intermediate=48,
)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    out: Path = tmp_path_factory.mktemp("organism")
    return build_organism(MINIATURE, out)
