"""`--keep-top`: the file with the best rows of many behaviours agrees with the file of all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import score_tally, scores_writer
from pairtrace.engine.ranking import sources, top
from pairtrace.engine.score import ScoreConfig, ScoreSummary, score
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import ConfigError
from tests.engine.small_store import SmallStore, any_values, make_store
from tests.engine.test_score import behavior_file

NAMES = [f"v{number}" for number in range(12)] + ["bank"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), rows=700)


@pytest.fixture(scope="module")
def behaviors(tmp_path_factory: pytest.TempPathFactory) -> str:
    vectors = [(name, 5, any_values(number, 24)) for number, name in enumerate(NAMES[:-1])]
    path = tmp_path_factory.mktemp("behaviors") / "b.safetensors"
    return behavior_file(path, *vectors, ("bank", 5, any_values(99, 5, 24)))


def run(store: SmallStore, behaviors: str, out: Path, **options: Any) -> tuple[ScoreSummary, pd.DataFrame]:
    summary = score(ScoreConfig(store=store.path, directions=(behaviors,), out=str(out), **options))
    return summary, pq.read_table(out).to_pandas()


def assert_best_of(best: pd.DataFrame, whole: pd.DataFrame, k: int) -> None:
    """`best` is `whole` without what is not among the k best."""
    kept = np.zeros(len(whole), bool)
    for name in NAMES:
        kept |= (whole[f"rank:{name}"] <= k).to_numpy()
    expected = whole[kept].reset_index(drop=True)
    for name in NAMES:
        outside = ~(expected[f"rank:{name}"] <= k)
        for kind in ("score", "rank", "percentile"):
            expected.loc[outside, f"{kind}:{name}"] = np.nan
    pd.testing.assert_frame_equal(best, expected, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("k", [1, 7, 10_000])
@pytest.mark.parametrize("row_group", [1 << 16, 50])
def test_the_file_is_the_whole_file_without_the_rest(
    store: SmallStore, behaviors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, row_group: int
) -> None:
    monkeypatch.setattr(scores_writer, "ROW_GROUP", row_group)
    everything, whole = run(store, behaviors, tmp_path / "whole.parquet")
    summary, best = run(store, behaviors, tmp_path / "best.parquet", keep_top=k)
    assert_best_of(best, whole, k)
    assert summary.behaviors == everything.behaviors and summary.kept == len(best) <= len(NAMES) * k
    assert (summary.rows, summary.scored, summary.undefined) == (700, 697, 1)
    nulls = pq.read_table(tmp_path / "best.parquet")["score:v0"].null_count
    assert nulls == len(best) - min(k, 697)


def test_a_tally_that_shifts_rows_would_be_noticed(
    store: SmallStore, behaviors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run(store, behaviors, tmp_path / "whole.parquet")

    class Shifted(score_tally.StreamingTopK):
        def update(self, scores: Any, start_row: int) -> None:
            super().update(scores, start_row + 1)

    monkeypatch.setattr(score_tally, "StreamingTopK", Shifted)
    _, best = run(store, behaviors, tmp_path / "best.parquet", keep_top=3)
    with pytest.raises(AssertionError):
        assert_best_of(best, whole, 3)


def test_the_manifest_says_how_all_scores_are_distributed(store: SmallStore, behaviors: str, tmp_path: Path) -> None:
    _, whole = run(store, behaviors, tmp_path / "whole.parquet")
    run(store, behaviors, tmp_path / "best.parquet", keep_top=3)
    manifest = ScoresTable.open(tmp_path / "best.parquet", allow_top=True).manifest
    assert manifest["keep_top"] == 3 and sorted(manifest["summaries"]) == sorted(NAMES)
    for name, summary in manifest["summaries"].items():
        scores = whole[f"score:{name}"].dropna().to_numpy(np.float64)
        assert summary["scored"] == len(scores)
        assert summary["highest"] == scores.max() and summary["lowest"] == scores.min()
        assert summary["quantile_error"] == 2 / 4096
        for share, value in summary["quantiles"].items():
            exact = np.quantile(scores, float(share), method="inverted_cdf")
            assert value == pytest.approx(exact, abs=summary["quantile_error"])


def test_many_behaviors_have_coarser_histograms() -> None:
    usable = np.ones(4, bool)
    assert score_tally.TopScores(3000, usable, 5).summary(0)["quantile_error"] == 2 / 1024
    assert score_tally.TopScores(1, usable, 5).summary(0)["quantile_error"] == 2 / 4096


def test_top_reads_such_a_file(store: SmallStore, behaviors: str, tmp_path: Path) -> None:
    run(store, behaviors, tmp_path / "whole.parquet")
    run(store, behaviors, tmp_path / "best.parquet", keep_top=5)
    for name in ("v3", "bank"):
        found = top(tmp_path / "best.parquet", behavior=name, k=5)
        assert found == top(tmp_path / "whole.parquet", behavior=name, k=5, ends="top")
        assert [pair.rank for pair in found] == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match=r"-k is 6, but .* only the top 5 rows .* --keep-top 6"):
        top(tmp_path / "best.parquet", behavior="v3", k=6)
    with pytest.raises(ConfigError, match=r"only the top 5 rows .* without --keep-top for --end bottom"):
        top(tmp_path / "best.parquet", behavior="v3", k=2, ends="bottom")


def test_what_needs_all_rows_refuses_such_a_file(store: SmallStore, behaviors: str, tmp_path: Path) -> None:
    run(store, behaviors, tmp_path / "best.parquet", keep_top=5)
    with pytest.raises(ConfigError, match=r"only the top 5 rows of each behaviour .* score again without --keep-top"):
        sources(tmp_path / "best.parquet", behavior="v3")
    with pytest.raises(ConfigError, match="--keep-top is 0; expected at least 1"):
        run(store, behaviors, tmp_path / "best.parquet", keep_top=0)


def test_an_incomplete_store_and_no_score_at_all(tmp_path: Path, behaviors: str) -> None:
    gap = make_store(tmp_path / "gap", skip_shards=(1,))
    _, whole = run(gap, behaviors, tmp_path / "whole.parquet", allow_incomplete=True)
    summary, best = run(gap, behaviors, tmp_path / "best.parquet", allow_incomplete=True, keep_top=4)
    assert_best_of(best, whole, 4)
    assert summary.missing == 64
    nothing = make_store(tmp_path / "nothing", rows=20, quarantined=tuple(range(15)), zero=tuple(range(15, 20)))
    summary, best = run(nothing, behaviors, tmp_path / "none.parquet", keep_top=4)
    assert (summary.kept, summary.scored, summary.undefined, len(best)) == (0, 0, 5, 0)
    manifest = ScoresTable.open(tmp_path / "none.parquet", allow_top=True).manifest
    assert set(manifest["summaries"]["v0"]["quantiles"].values()) == {None}
