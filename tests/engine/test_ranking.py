from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from pairtrace.engine import ranking
from pairtrace.engine.intervals import wilson_interval
from pairtrace.engine.pairs import PairSource
from pairtrace.engine.ranking import sources, top
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.errors import ConfigError, DataError, DataFormatError, DataMismatchError
from tests.engine.small_store import SmallStore, any_values, make_store, reference_cosine, write_data


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallStore, str]:
    root = tmp_path_factory.mktemp("ranking")
    names = [("web", "code", "chat")[row % 3] for row in range(300)]
    # A tiny source whose two pairs will be at the very top, and rows without a source.
    names[20] = names[21] = "tiny"
    names[40] = names[41] = ""
    store = make_store(root, sources=names, layers=(5,))
    np.save(root / "harm.npy", any_values(1, 24))
    score(ScoreConfig(store=store.path, directions=(str(root / "harm.npy"),), out=str(root / "s.parquet")))
    return store, str(root / "s.parquet")


def test_pairs_without_a_score_are_said(scored: tuple[SmallStore, str], caplog: pytest.LogCaptureFixture) -> None:
    store, path = scored
    ranked = len(expected_order(store))
    assert ranked < 300
    with caplog.at_level(logging.INFO, logger="pairtrace"):
        assert sum(share.rows for share in sources(path)) == ranked
    assert f"{300 - ranked} of 300 pairs have no score" in caplog.text


def expected_order(store: SmallStore) -> list[int]:
    cosine = reference_cosine(store.rows[5], any_values(1, 24))
    usable = [row for row in range(300) if store.status[row] == 1 and np.isfinite(cosine[row])]
    return sorted(usable, key=lambda row: -cosine[row])


def texts_match(shown: list[Any], store: SmallStore) -> bool:
    """Whether every shown text belongs to the row whose score it stands beside."""
    cosine = reference_cosine(store.rows[5], any_values(1, 24))
    return all(
        (pair.prompt, pair.chosen, pair.rejected) == (f"question {pair.row}", f" yes {pair.row}", f" no {pair.row}")
        and abs(pair.score - cosine[pair.row]) < 2e-6
        for pair in shown
    )


def test_both_ends_carry_their_own_texts(scored: tuple[SmallStore, str]) -> None:
    store, path = scored
    order = expected_order(store)
    shown = top(path, k=4)
    assert [pair.row for pair in shown] == order[:4] + order[::-1][:4]
    assert [pair.end for pair in shown] == ["top"] * 4 + ["bottom"] * 4
    assert [pair.rank for pair in shown] == [1, 2, 3, 4, 297, 296, 295, 294]
    assert shown[0].percentile == 100
    assert texts_match(shown, store)
    assert [pair.source for pair in shown] == [store.sources[pair.row] for pair in shown]
    assert [pair.row for pair in top(path, k=3, ends="top", behavior="harm")] == order[:3]
    assert [pair.row for pair in top(path, k=3, ends="bottom")] == order[::-1][:3]


def test_a_join_shifted_by_one_row_would_be_noticed(
    scored: tuple[SmallStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = scored
    honest = PairSource.take
    monkeypatch.setattr(PairSource, "take", lambda self, rows: honest(self, [row + 1 for row in rows]))
    with pytest.raises(DataMismatchError, match="data has row"):
        top(path, k=4)

    def disguised(self: PairSource, rows: list[int]) -> list[Any]:
        # The wrong texts under the right row numbers and sources.
        pairs = honest(self, [row + 1 for row in rows])
        right = honest(self, rows)
        return [type(p)(r.row, p.prompt, p.chosen, p.rejected, r.source) for p, r in zip(pairs, right, strict=True)]

    monkeypatch.setattr(PairSource, "take", disguised)
    assert not texts_match(top(path, k=4), store)


def test_no_pair_is_shown_twice(scored: tuple[SmallStore, str]) -> None:
    shown = top(scored[1], k=200)
    assert len(shown) == 297
    assert len({pair.row for pair in shown}) == 297


def test_other_data_is_refused(scored: tuple[SmallStore, str], tmp_path: Path) -> None:
    store, path = scored
    changed = list(store.sources)
    changed[5] = "other"
    with pytest.raises(DataMismatchError, match="is not the data"):
        top(path, data=write_data(tmp_path / "changed.jsonl", changed))
    with pytest.raises(DataMismatchError, match="is not the data"):
        top(path, data=write_data(tmp_path / "short.jsonl", store.sources[:-1]))
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(Path(store.data).read_bytes())
    assert top(path, data=copied, k=1)[0].row == expected_order(store)[0]


def test_a_source_that_differs_is_refused(
    scored: tuple[SmallStore, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(scored[1])
    shuffled = table["source"].to_pylist()[1:] + ["web"]
    index = table.schema.get_field_index("source")
    pq.write_table(table.set_column(index, "source", [shuffled]), tmp_path / "s.parquet")
    with pytest.raises(DataMismatchError, match="comes from source"):
        top(tmp_path / "s.parquet", k=50)


def with_manifest(path: str, out: Path, **store_manifest: Any) -> Path:
    """The same scores with a changed record of the data."""
    table = pq.read_table(path)
    manifest = json.loads(table.schema.metadata[b"pairtrace"])
    manifest["store_manifest"] |= store_manifest
    pq.write_table(table.replace_schema_metadata({b"pairtrace": json.dumps(manifest).encode()}), out)
    return out


def test_data_that_is_no_longer_there_can_be_named(scored: tuple[SmallStore, str], tmp_path: Path) -> None:
    store, path = scored
    for place in ("gone.jsonl", str(tmp_path / "gone.jsonl")):
        moved = with_manifest(path, tmp_path / "s.parquet", data=place)
        with pytest.raises(DataError, match=r"where the store recorded it, .*gone\.jsonl.*say where it is with --data"):
            top(moved)
        assert top(moved, data=store.data, k=1)[0].row == expected_order(store)[0]
    with pytest.raises(DataError) as caught:
        top(path, data=str(tmp_path / "wrong.jsonl"))
    assert "recorded" not in str(caught.value)


@pytest.mark.parametrize("change", [{"data": 3}, {"columns": None}, {"rows": "many"}, {"limit": 1.5}])
def test_scores_without_a_record_of_the_data_are_refused(
    scored: tuple[SmallStore, str], tmp_path: Path, change: dict[str, Any]
) -> None:
    broken = with_manifest(scored[1], tmp_path / "s.parquet", **change)
    with pytest.raises(DataFormatError, match=f"no valid store_manifest.{next(iter(change))}"):
        top(broken)
    table = pq.read_table(scored[1])
    pq.write_table(table.replace_schema_metadata({b"pairtrace": b'{"schema_version": 1}'}), tmp_path / "s.parquet")
    with pytest.raises(DataFormatError, match="does not say which data it ranks"):
        top(tmp_path / "s.parquet")


def test_a_source_called_none_is_not_the_lack_of_one(tmp_path: Path) -> None:
    names = [("(none)", "", "web")[row % 3] for row in range(300)]
    store = make_store(tmp_path, sources=names, layers=(5,), quarantined=(), zero=())
    np.save(tmp_path / "harm.npy", any_values(1, 24))
    out = str(tmp_path / "s.parquet")
    score(ScoreConfig(store=store.path, directions=(str(tmp_path / "harm.npy"),), out=out))
    assert {share.source: share.rows for share in sources(out, k=30)} == {"(none)": 100, "": 100, "web": 100}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 0}, "k is 0"), ({"ends": "middle"}, "--end is 'middle'"), ({"behavior": "x"}, "'x' is not")],
)
def test_bad_options_of_top(scored: tuple[SmallStore, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        top(scored[1], **options)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 40), (170, 400), (1, 10**6)])
def test_wilson_intervals_equal_those_of_scipy(count: int, total: int, confidence: float) -> None:
    reference = binomtest(count, total).proportion_ci(confidence_level=confidence, method="wilson")
    assert wilson_interval(count, total, confidence) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_knows_nothing_without_trials_and_refuses_bad_confidence() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for confidence in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="confidence"):
            wilson_interval(1, 2, confidence)


def test_sources_count_like_a_plain_loop(scored: tuple[SmallStore, str]) -> None:
    store, path = scored
    order = expected_order(store)
    shares = {share.source: share for share in sources(path, k=30)}
    assert set(shares) == {"web", "code", "chat", "tiny", ""}
    for name, share in shares.items():
        rows = sum(store.sources[row] == name for row in order)
        top_rows = sum(store.sources[row] == name for row in order[:30])
        assert (share.rows, share.top_rows) == (rows, top_rows)
        assert share.share_of_data == pytest.approx(rows / 297)
        assert share.share_of_top == pytest.approx(top_rows / 30)
        assert share.lift == pytest.approx((top_rows / 30) / (rows / 297))
        reference = binomtest(top_rows, 30).proportion_ci(method="wilson")
        assert share.share_of_top_interval == pytest.approx((reference.low, reference.high))
        assert share.lift_interval == pytest.approx((reference.low * 297 / rows, reference.high * 297 / rows))
        own_rate = binomtest(top_rows, rows).proportion_ci(method="wilson")
        assert share.rate == pytest.approx(top_rows / rows)
        assert share.rate_interval == pytest.approx((own_rate.low, own_rate.high))
    assert sum(share.rows for share in shares.values()) == 297
    assert sum(share.top_rows for share in shares.values()) == 30


def test_the_default_top_is_one_percent(scored: tuple[SmallStore, str]) -> None:
    assert sum(share.top_rows for share in sources(scored[1])) == 2


def test_a_tiny_source_does_not_win_by_luck(tmp_path: Path) -> None:
    names = ["lucky"] + ["guilty"] * 60 + ["clean"] * 239
    store = make_store(tmp_path, sources=names, layers=(5,), width=64, quarantined=(), zero=())
    # Point the direction at the rows of the first two sources.
    direction = np.concatenate([store.rows[5][:1] * 2, store.rows[5][1:61]]).sum(axis=0)
    np.save(tmp_path / "harm.npy", direction)
    out = str(tmp_path / "s.parquet")
    score(ScoreConfig(store=store.path, directions=(str(tmp_path / "harm.npy"),), out=out))
    ranks = ranking.ScoresTable.open(out).ranks("harm")
    k = max(60, int(ranks[0]))
    shares = sources(out, k=k)
    lucky = next(share for share in shares if share.source == "lucky")
    assert lucky.rate == 1.0
    assert shares[0].source == "guilty"
    assert shares[0].rate < lucky.rate


def test_bad_options_of_sources(scored: tuple[SmallStore, str]) -> None:
    for k in (0, 298):
        with pytest.raises(ConfigError, match=f"k is {k}; expected 1 to 297"):
            sources(scored[1], k=k)
    with pytest.raises(ConfigError, match="confidence"):
        sources(scored[1], confidence=2)
