"""Enrichment against SciPy and plain counting: p-values, q-values, intervals, which columns are read."""

from __future__ import annotations

import json
import logging
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from pairtrace.engine.discovery import columns as columns_module
from pairtrace.engine.discovery import enrichment
from pairtrace.engine.discovery.columns import Column, metadata_columns, store_columns
from pairtrace.engine.discovery.enrichment import (
    benjamini_hochberg,
    count_datapoints,
    count_members,
    enrichments,
    hypergeometric_tail,
)
from pairtrace.engine.pairs import open_pairs
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError
from pairtrace.store.reader import ActivationStore
from tests.engine.small_store import make_store


@pytest.mark.parametrize("total", [1, 2, 7, 60, 1_000_000])
def test_tails_of_the_hypergeometric_distribution(total: int) -> None:
    rng = np.random.default_rng(total)
    having = rng.integers(0, total + 1, 300)
    size = rng.integers(0, total + 1, 300)
    fewest, most = np.maximum(0, having + size - total), np.minimum(having, size)
    # Around the mean, where tables of real data lie, and anywhere.
    near = (having * (size / total) + rng.normal(size=300) * np.sqrt(size) / 2).round().astype(np.int64)
    for inside in (near.clip(fewest, most), rng.integers(fewest, most + 1), fewest, most):
        expected = stats.hypergeom.sf(inside - 1, total, having, size)
        np.testing.assert_allclose(
            hypergeometric_tail(inside, size, having, total), expected, rtol=1e-6 if total > 100 else 1e-12, atol=1e-300
        )


def test_the_tail_is_fisher_s_exact_test() -> None:
    table = [[7, 3], [4, 26]]
    expected = stats.fisher_exact(table, alternative="greater").pvalue
    found = hypergeometric_tail(np.array([7]), np.array([10]), np.array([11]), 40)
    assert found[0] == pytest.approx(expected, rel=1e-12)


def test_no_more_than_certain() -> None:
    assert hypergeometric_tail(np.array([0, 5]), np.array([5, 5]), np.array([3, 20]), 20).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_q_values(count: int) -> None:
    p_values = np.random.default_rng(count).random(count).round(1) ** 3  # ties, zeros and ones
    expected = stats.false_discovery_control(p_values, method="bh") if count else p_values
    np.testing.assert_allclose(benjamini_hochberg(p_values), expected, rtol=1e-12)


def wilson(count: int, total: int) -> tuple[float, float]:
    """The two roots of (p - count/total)^2 = z^2 p (1 - p) / total."""
    z, share = float(stats.norm.ppf(0.975)), count / total
    a, b, c = 1 + z * z / total, -2 * share - z * z / total, share * share
    spread = sqrt(max(b * b - 4 * a * c, 0.0))
    return (-b - spread) / (2 * a), (-b + spread) / (2 * a)


def test_all_tests_of_all_columns_are_corrected_together() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 4, 500).astype(np.int32)
    planted = np.where((labels == 1) & (rng.random(500) < 0.5), "plant", rng.choice(["a", "b", "c"], 500))
    texts = {"kind": planted, "day": rng.choice(list("xyz"), 500), "split": np.full(500, "train")}
    counts = [count_members(Column.of(name, values.tolist()), labels, 4) for name, values in texts.items()]

    cells, p_values = [], []
    for name in ("kind", "day"):  # "split" has one value, which tells nothing apart
        for cluster in range(4):
            for value in sorted(set(texts[name].tolist())):
                inside, has = labels == cluster, texts[name] == value
                table = [[(inside & has).sum(), (inside & ~has).sum()], [(~inside & has).sum(), (~inside & ~has).sum()]]
                cells.append((cluster, name, value, table))
                p_values.append(stats.fisher_exact(table, alternative="greater").pvalue)
    q_values = stats.false_discovery_control(p_values)

    found, tests = enrichments(counts, 4, false_discovery_rate=0.5)
    assert tests == len(cells)
    flat = {(cluster, one.column, one.value): one for cluster, group in enumerate(found) for one in group}
    expected = {cell[:3]: (cell[3], p, q) for cell, p, q in zip(cells, p_values, q_values, strict=True) if q <= 0.5}
    assert sorted(flat) == sorted(expected)
    assert (1, "kind", "plant") in flat
    for key, (table, p_value, q_value) in expected.items():
        one, (inside, outside) = flat[key], table
        assert (one.inside, one.inside_total) == (inside[0], sum(inside))
        assert (one.outside, one.outside_total) == (outside[0], sum(outside))
        assert (one.p_value, one.q_value) == (pytest.approx(p_value, rel=1e-9), pytest.approx(q_value, rel=1e-9))
        assert one.share_inside == inside[0] / sum(inside)
        assert one.share_outside == outside[0] / sum(outside)
        assert one.share_inside_interval == pytest.approx(wilson(inside[0], sum(inside)), abs=1e-12)
        assert one.ratio == (pytest.approx(one.share_inside / one.share_outside) if outside[0] else None)
    for group in found:
        assert [one.q_value for one in group] == sorted(one.q_value for one in group)
    assert [one.value for one in enrichments(counts, 4)[0][1]] == ["plant"]


def test_chance_is_not_enriched() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        labels = rng.integers(-1, 5, 300).astype(np.int32)
        column = Column.of("source", rng.choice(["a", "b", "c", "d"], 300).tolist())
        found += any(enrichments([count_members(column, labels, 5)], 5)[0])
    assert found <= 10  # 5 of 100 at a rate of 0.05; discrete values make it fewer


def test_datapoints_may_be_shared_and_are_compared_with_usable_rows_only() -> None:
    column = Column.of("source", ["a"] * 30 + ["b"] * 70)
    usable = np.arange(100) % 10 != 9
    rows = np.array([[0, 1, 2, 3, 4, -1], [0, 1, 2, 50, 51, 52]])
    counts = count_datapoints(column, rows, usable)
    assert counts.inside.tolist() == [[5, 0], [3, 3]]
    assert counts.overall.tolist() == [27, 63]
    ((best,), second), tests = enrichments([counts], 2)
    assert (best.among, best.value, best.inside_total, best.outside_total) == ("datapoints", "a", 5, 85)
    assert best.p_value == pytest.approx(float(stats.hypergeom.sf(4, 90, 27, 5)))
    assert (second, tests) == ((), 4)


def test_only_the_strongest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrichment, "KEPT", 2)
    labels = np.repeat(np.arange(2, dtype=np.int32), 60)
    values = [f"{label}-{row % 3}" for row, label in enumerate(labels.tolist())]
    (first, second), _ = enrichments([count_members(Column.of("kind", values), labels, 2)], 2)
    assert [len(first), len(second)] == [2, 2]


def test_nothing_to_test() -> None:
    same = count_members(Column.of("kind", ["a"] * 5), np.zeros(5, np.int32), 1)
    assert enrichments([same], 1) == ([()], 0)
    assert enrichments([], 2) == ([(), ()], 0)
    assert enrichments([count_members(Column.of("kind", ["a", "b"]), np.full(2, -1, np.int32), 0)], 0) == ([], 0)


def texts_of(column: Column) -> list[str]:
    return [column.values[code] for code in column.codes]


def test_columns_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "MOST_VALUES", 4)
    rows = 2500  # several batches
    table = {
        "prompt": ["p"] * rows,
        "chosen": [f" c{row}" for row in range(rows)],
        "rejected": [f" r{row}" for row in range(rows)],
        "source": ["web"] * rows,
        "turns": pa.array([row % 3 if row % 5 else None for row in range(rows)], pa.int64()),
        "safe": [row % 2 == 0 for row in range(rows)],
        "id": [f"id-{row}" for row in range(rows)],
        "late": ["x"] * 2000 + [str(row % 7) for row in range(500)],
        "tags": [["a"]] * rows,
    }
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    source = open_pairs(tmp_path / "pairs.parquet", limit=2400)
    found, left_out = metadata_columns(source, 2400, None)
    assert [column.name for column in found] == ["turns", "safe"]
    assert sorted(left_out) == ["id", "late"]
    assert texts_of(found[0]) == [str(row % 3) if row % 5 else "" for row in range(2400)]
    assert found[0].values == ("", "0", "1", "2")
    assert texts_of(found[1]) == [str(row % 2 == 0) for row in range(2400)]
    assert [column.name for column in metadata_columns(source, 2400, ["safe"])[0]] == ["safe"]
    assert metadata_columns(source, 2400, []) == ([], {})
    with pytest.raises(ConfigError, match="no column 'nope' in the data; there is: prompt"):
        metadata_columns(source, 2400, ["nope"])
    with pytest.raises(ConfigError, match="'tags' holds list"):
        metadata_columns(source, 2400, ["tags"])
    with pytest.raises(DataMismatchError, match="has 2500 rows, but had 2600"):
        metadata_columns(source, 2600, None)


def test_columns_of_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make_store(tmp_path)
    store = ActivationStore.open(made.path)
    for source in (None, open_pairs(made.data)):
        found, left_out = store_columns(store, source, None)
        assert ([column.name for column in found], left_out) == (["source"], {})
        assert texts_of(found[0]) == made.sources
        assert texts_of(found[0].take(np.array([5, 1]))) == [made.sources[5], made.sources[1]]
    with pytest.raises(ConfigError, match="say where with --data"):
        store_columns(store, None, ["kind"])

    lines = [json.loads(line) for line in Path(made.data).read_text().splitlines()]
    mixed = [{**line, "kind": row if row % 2 else [row]} for row, line in enumerate(lines)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mixed))
    source = open_pairs(tmp_path / "mixed.jsonl")
    with caplog.at_level(logging.WARNING):
        found, left_out = store_columns(store, source, None)
    assert ([column.name for column in found], list(left_out)) == (["source"], ["metadata"])
    assert "described without metadata" in caplog.text
    with pytest.raises(DataFormatError, match="kind"):
        store_columns(store, source, ["kind"])
