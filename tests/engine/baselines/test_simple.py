"""Baselines without a model, and their files in the hands of everything that reads scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pairtrace.engine.baselines.scores_file import write_baseline
from pairtrace.engine.baselines.simple import LengthConfig, RandomConfig, score_length, score_random
from pairtrace.engine.cost import costs_path, read_costs
from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.ranking import sources, top
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataFormatError, StoreIncompleteError
from pairtrace.store.reader import ActivationStore
from tests.engine.small_store import SmallStore, make_store

QUARANTINED = (7, 40)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return np.random.default_rng(3).permutation(3 * 90).reshape(90, 3) + 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, counts: np.ndarray) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), rows=90, quarantined=QUARANTINED, tokens=counts)


def column(path: str, name: str) -> list[float | None]:
    return pq.read_table(path, columns=[f"score:{name}"]).column(0).to_pylist()


def test_length_is_chosen_minus_rejected(store: SmallStore, counts: np.ndarray, tmp_path: Path) -> None:
    out = str(tmp_path / "length.parquet")
    summary = score_length(LengthConfig(store=store.path, out=out))
    expected = [
        None if row in QUARANTINED else float(chosen - rejected) for row, (_, chosen, rejected) in enumerate(counts)
    ]
    assert column(out, "length") == expected
    assert (summary.rows, summary.scored, summary.quarantined, summary.unscored) == (90, 88, 2, 0)
    best = max((value, row) for row, value in enumerate(expected) if value is not None)[1]
    assert top(out, k=1, ends="top")[0].row == best
    (cost,) = read_costs(costs_path(out))
    assert (cost.method, cost.stage, cost.model_tokens) == ("length", "score", 0)


def test_random_is_a_permutation_of_even_spacing(store: SmallStore, tmp_path: Path) -> None:
    first, again, other = (str(tmp_path / f"{name}.parquet") for name in "abc")
    for out, seed in ((first, 1), (again, 1), (other, 2)):
        score_random(RandomConfig(store=store.path, out=out, seed=seed))
    scores = column(first, "random")
    assert scores == column(again, "random") != column(other, "random")
    places = (np.array([value for value in scores if value is not None]) + 1) * 45 - 0.5
    assert np.allclose(places, places.round(), atol=1e-4)
    assert len(set(places.round())) == 88
    assert set(places.round()) < set(range(90))
    assert [row for row, value in enumerate(scores) if value is None] == list(QUARANTINED)
    assert ScoresTable.open(first).manifest["details"] == {"seed": 1}


@pytest.mark.parametrize("action", ["filter", "swap"])
def test_edit_and_sources_read_the_file(store: SmallStore, tmp_path: Path, action: str) -> None:
    out = str(tmp_path / "length.parquet")
    score_length(LengthConfig(store=store.path, out=out, name="longer"))
    scores = np.array([np.nan if value is None else value for value in column(out, "longer")])
    edited = str(tmp_path / "edited.parquet")
    # Lengths are no cosines: a threshold beyond 1 has a meaning here.
    rule = SelectionRule(threshold=100.0)
    summary = edit(EditConfig(scores=out, out=edited, action=action, rule=rule, behavior="longer"))  # type: ignore[arg-type]
    taken = set(np.flatnonzero(scores >= 100.0).tolist())
    assert 0 < len(taken) < 88
    rows = pq.read_table(edited).to_pylist()
    if action == "filter":
        assert [row["prompt"] for row in rows] == [f"question {row}" for row in range(90) if row not in taken]
    else:
        assert {row for row, pair in enumerate(rows) if pair["chosen"] == f" no {row}"} == taken
    assert summary.to_dict()["rows_before"] == 90
    assert sum(share.top_rows for share in sources(out, k=20)) == 20


def test_what_has_no_finite_score_is_null(store: SmallStore, tmp_path: Path) -> None:
    out = str(tmp_path / "own.parquet")
    scores = np.arange(90, dtype=np.float32)
    scores[[3, 5, 7]] = np.nan, np.inf, np.nan
    opened = ActivationStore.open(store.path)
    summary = write_baseline(opened, out, {"a": scores, "b": -scores}, method="mine", details={"note": [1]})
    assert (summary.scored, summary.quarantined, summary.unscored) == (86, 2, 2)
    assert [row for row, value in enumerate(column(out, "a")) if value is None] == [3, 5, *QUARANTINED]
    table = ScoresTable.open(out)
    assert table.behaviors == ("a", "b")
    assert (table.manifest["method"], table.manifest["details"]) == ("mine", {"note": [1]})
    assert table.manifest["store_manifest"] == opened.manifest.to_json()
    assert table.ranks("a").argmax() == 0
    assert table.ranks("b")[0] == 1


def test_bad_input(store: SmallStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end in \.parquet"):
        RandomConfig(store=store.path, out="scores.csv")
    with pytest.raises(ConfigError, match="--seed"):
        RandomConfig(store=store.path, out="a.parquet", seed=-1)
    half = make_store(tmp_path / "half", rows=90, quarantined=(), skip_shards=(1,))
    with pytest.raises(StoreIncompleteError):
        score_random(RandomConfig(store=half.path, out=str(tmp_path / "half.parquet")))
    assert not list(tmp_path.glob("half.*")), "a run that failed before any work leaves nothing"
    out = str(tmp_path / "random.parquet")
    score_random(RandomConfig(store=store.path, out=out))
    with pytest.raises(DataFormatError, match="use --null sign-flip"):
        rule = SelectionRule(fdr=0.1, null="random")
        edit(EditConfig(scores=out, out=str(tmp_path / "e.parquet"), action="filter", rule=rule))
