from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import null_scores
from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.null_scores import random_tail
from pairtrace.engine.progress import NULL_PROGRESS
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataFormatError, StoreError
from tests.engine.small_store import SmallStore, any_values, make_store, reference_cosine


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallStore, str]:
    root = tmp_path_factory.mktemp("null")
    store = make_store(root, sources=["web"] * 300, layers=(5,))
    np.save(root / "harm.npy", any_values(1, 24))
    np.save(root / "bank.npy", any_values(2, 4, 24))
    paths = (str(root / "harm.npy"), str(root / "bank.npy"))
    score(ScoreConfig(store=store.path, directions=paths, out=str(root / "s.parquet")))
    return store, str(root / "s.parquet")


@pytest.mark.parametrize(("behavior", "bank"), [("harm", 1), ("bank", 4)])
def test_the_tail_counts_the_scores_of_random_directions(
    scored: tuple[SmallStore, str], behavior: str, bank: int
) -> None:
    store, path = scored
    tail = random_tail(ScoresTable.open(path), behavior, None, 3, NULL_PROGRESS)
    count = max(1, null_scores._DIRECTIONS // bank)
    directions = np.random.default_rng(3).standard_normal((count * bank, 24)).astype(np.float32)
    cosines = np.stack([reference_cosine(store.rows[5], direction) for direction in directions], axis=1)
    chance = cosines.reshape(len(cosines), count, bank).max(axis=2)
    chance = chance[np.isfinite(chance)]
    # The histogram resolves 2 / 4096.
    at = np.array([-0.3, 0.0, 0.2, 0.35, 0.5])
    slack = 1.01 * 2 / 4096
    low, high = [(chance[None, :] >= (at + sign * slack)[:, None]).mean(axis=1) for sign in (1, -1)]
    found = tail(at)
    assert (found >= low - 1e-12).all() and (found <= np.maximum(high, 1 / chance.size)).all()
    assert tail(np.array([1.0]))[0] > 0


def test_an_edit_against_random_directions(scored: tuple[SmallStore, str], tmp_path: Path) -> None:
    path = scored[1]
    rule = SelectionRule(fdr=0.9, null="random")
    config = EditConfig(
        scores=path, out=str(tmp_path / "e.parquet"), action="filter", rule=rule, behavior="bank", seed=3
    )
    summary = edit(config)
    assert summary.estimated_fdr is not None and summary.estimated_fdr <= 0.9
    assert pq.read_metadata(tmp_path / "e.parquet").num_rows == 300 - summary.removed
    with pytest.raises(StoreError, match="nowhere"):
        random_tail(ScoresTable.open(path), "harm", str(tmp_path / "nowhere.zarr"), 0, NULL_PROGRESS)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_random_null_is_named_where_the_other_end_does_not_do(
    scored: tuple[SmallStore, str], tmp_path: Path, shift: float
) -> None:
    """Both where the scores are no noise around zero and where their other end is as full."""
    table = pq.read_table(scored[1])
    place = table.schema.get_field_index("score:harm")
    values = np.random.default_rng(0).permutation(np.linspace(-0.9, 0.9, table.num_rows)).astype(np.float32) + shift
    rank = table.schema.get_field_index("rank:harm")
    ranks = np.argsort(np.argsort(-values)) + 1
    changed = table.set_column(place, table.schema.field(place), [values])
    pq.write_table(changed.set_column(rank, table.schema.field(rank), [ranks]), tmp_path / "s.parquet")
    rule = SelectionRule(fdr=0.01)
    config = EditConfig(
        scores=str(tmp_path / "s.parquet"), out=str(tmp_path / "e.parquet"), action="filter", rule=rule, behavior="harm"
    )
    with pytest.raises(ConfigError, match="median is" if shift else "takes no pair") as caught:
        edit(config)
    assert "take --null random" in str(caught.value)


def test_scores_of_another_making_need_the_other_null(scored: tuple[SmallStore, str], tmp_path: Path) -> None:
    table = pq.read_table(scored[1])
    metadata = dict(table.schema.metadata)
    manifest = json.loads(metadata[b"pairtrace"])
    del manifest["directions"]
    pq.write_table(table.replace_schema_metadata({b"pairtrace": json.dumps(manifest)}), tmp_path / "s.parquet")
    with pytest.raises(DataFormatError, match="use --null sign-flip"):
        random_tail(ScoresTable.open(tmp_path / "s.parquet"), "harm", None, 0, NULL_PROGRESS)
