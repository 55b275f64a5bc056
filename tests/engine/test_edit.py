from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import edited_rows
from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.restore import restore
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataError, DataFormatError, DataMismatchError
from tests.engine import pair_files
from tests.engine.scored_files import write_scored

N = 2500
WRITERS: list[Callable[[Path, Sequence[Any]], Path]] = [
    pair_files.write_jsonl,
    pair_files.write_json_gz,
    pair_files.write_parquet,
    pair_files.write_saved,
    pair_files.write_arrow_file,
    pair_files.write_directory,
]


def rows_with_ratings(count: int = N) -> list[dict[str, Any]]:
    """Rows whose every value belongs to one row and one side; some hold nulls."""
    rows = pair_files.make_rows(count)
    for number, row in enumerate(rows):
        row["score_chosen"], row["score_rejected"] = float(number), None if number % 7 == 0 else -float(number)
        row["rejected-model"], row["chosen-model"] = f"weak-{number % 5}", f"strong-{number % 4}"
        row["tags"] = None if number % 3 == 0 else [f"tag {number}"]
    return rows


ROWS = rows_with_ratings()


def any_scores(seed: int = 0, count: int = N) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0.0, 0.2, count).clip(-1, 1).astype(np.float32)
    scores[5] = np.nan
    return scores


def best(scores: np.ndarray, k: int) -> list[int]:
    """The k best rows by a plain sort."""
    defined = [row for row in range(len(scores)) if not np.isnan(scores[row])]
    return sorted(defined, key=lambda row: (-float(scores[row]), row))[:k]


def swapped_row(row: dict[str, Any]) -> dict[str, Any]:
    twins = {"chosen": "rejected", "score_chosen": "score_rejected", "chosen-model": "rejected-model"}
    both = twins | {other: one for one, other in twins.items()}
    return {name: row[both.get(name, name)] for name in row}


def run(
    tmp_path: Path, data: Path, scores: np.ndarray, action: Any, rule: SelectionRule | None = None, **more: Any
) -> Any:
    path = write_scored(tmp_path / "scores.parquet", data, scores)
    return edit(EditConfig(scores=path, out=str(tmp_path / "edited.parquet"), action=action, rule=rule, **more))


def written(tmp_path: Path) -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / "edited.parquet").to_pylist()


def table_of(data: Path) -> pa.Table:
    source = open_pairs(data)
    schema = source.schema()
    return pa.Table.from_batches(source.batches(schema), schema)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("action", ["filter", "swap"])
def test_edits_of_every_container_touch_the_best_rows_only_and_can_be_undone(
    tmp_path: Path, writer: Any, action: str
) -> None:
    data = writer(tmp_path, ROWS)
    scores = any_scores()
    summary = run(tmp_path, data, scores, action, SelectionRule(k=300))
    taken = set(best(scores, 300))
    if action == "filter":
        expected = [row for number, row in enumerate(ROWS) if number not in taken]
    else:
        expected = [swapped_row(row) if number in taken else row for number, row in enumerate(ROWS)]
    assert written(tmp_path) == expected
    assert (summary.rows_before, summary.rows_after) == (N, len(expected))
    assert summary.lowest_score == pytest.approx(scores[best(scores, 300)[-1]])
    original = table_of(data)
    assert pq.read_schema(tmp_path / "edited.parquet").remove_metadata() == original.schema.remove_metadata()
    back = restore(str(tmp_path / "edited.parquet"), str(tmp_path / "original.parquet"))
    restored = pq.read_table(tmp_path / "original.parquet")
    assert restored.equals(original)
    assert restored.schema.metadata == original.schema.metadata
    assert (back.rows, back.put_back + back.swapped_back) == (N, 300)


def test_the_change_record_names_every_changed_row(tmp_path: Path) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = any_scores()
    run(tmp_path, data, scores, "filter", SelectionRule(k=40))
    record = pq.read_table(tmp_path / "edited.changes.parquet").to_pylist()
    ids = pq.read_table(tmp_path / "scores.parquet", columns=["pair_id"]).column(0).to_pylist()
    assert [entry["row"] for entry in record] == sorted(best(scores, 40))
    for entry in record:
        row = entry["row"]
        assert entry["original"] == ROWS[row]
        assert (entry["action"], entry["pair_id"], entry["source"]) == ("filter", ids[row], f"set-{row % 3}")
        assert entry["score"] == scores[row] and entry["reason"] == "the top 40"


def test_a_swap_that_forgets_the_ratings_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = any_scores()
    monkeypatch.setattr("pairtrace.engine.edit.twin_columns", lambda schema, columns: (("chosen", "rejected"),))
    run(tmp_path, data, scores, "swap", SelectionRule(k=3))
    row = best(scores, 3)[0]
    assert written(tmp_path)[row]["chosen"] == ROWS[row]["rejected"]
    assert written(tmp_path)[row] != swapped_row(ROWS[row])


def test_edited_data_loads_in_datasets_with_its_features(tmp_path: Path) -> None:
    data = pair_files.write_saved(tmp_path, ROWS)
    run(tmp_path, data, any_scores(), "swap", SelectionRule(fraction=0.1))
    original = datasets.load_from_disk(data)
    edited = datasets.Dataset.from_parquet(str(tmp_path / "edited.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(original, datasets.Dataset) and isinstance(edited, datasets.Dataset)
    assert edited.features == original.features and len(edited) == N
    assert open_pairs(tmp_path / "edited.parquet").format == "conversational"


def test_sources_are_dropped_by_name_by_lift_and_by_column(tmp_path: Path) -> None:
    data = pair_files.write_jsonl(tmp_path, ROWS)
    scores = any_scores()
    scores[1::3] += 0.3  # set-1 fills the top
    summary = run(tmp_path, data, scores, "drop-sources", SelectionRule(k=100))
    assert summary.dropped == ("set-1",)
    assert [row["source"] for row in written(tmp_path)] == [f"set-{i % 3}" for i in range(N) if i % 3 != 1]
    assert {entry["action"] for entry in pq.read_table(tmp_path / "edited.changes.parquet").to_pylist()} == {
        "drop-source"
    }
    restore(str(tmp_path / "edited.parquet"), str(tmp_path / "original.parquet"))
    assert pq.read_table(tmp_path / "original.parquet").equals(table_of(data))

    summary = run(tmp_path, data, scores, "drop-sources", drop=("set-0", "set-2"))
    assert {row["source"] for row in written(tmp_path)} == {"set-1"} and summary.lowest_score is None

    summary = run(tmp_path, data, scores, "drop-sources", drop=("strong-3",), by="chosen-model")
    assert summary.removed == sum(row["chosen-model"] == "strong-3" for row in ROWS)
    assert "strong-3" not in {row["chosen-model"] for row in written(tmp_path)}


def test_rows_beyond_the_limit_of_the_store_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = any_scores(count=1000)
    path = write_scored(tmp_path / "scores.parquet", data, scores, limit=1000)
    with caplog.at_level(logging.WARNING):
        edit(EditConfig(scores=path, out=str(tmp_path / "edited.parquet"), action="filter", rule=SelectionRule(k=10)))
    assert written(tmp_path) == [row for number, row in enumerate(ROWS) if number not in best(scores, 10)]
    assert "rows from 1000 on were not scored" in caplog.text


def test_an_emptied_source_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pair_files.make_rows(60)
    rows[7]["source"] = "tiny"
    scores = np.linspace(-0.5, 0.5, 60)
    scores[7] = 0.9
    with caplog.at_level(logging.WARNING):
        summary = run(tmp_path, pair_files.write_jsonl(tmp_path, rows), scores, "filter", SelectionRule(k=1))
    assert "no pair of the sources: 'tiny'" in caplog.text
    assert next(one for one in summary.sources if one.source == "tiny").rows_after == 0


def test_scores_of_other_data_and_second_edits_are_refused(tmp_path: Path) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    path = write_scored(tmp_path / "scores.parquet", data, any_scores())
    first = EditConfig(scores=path, out=str(tmp_path / "edited.parquet"), action="filter", rule=SelectionRule(k=10))
    edit(first)
    with pytest.raises(DataMismatchError, match=r"itself the result of an edit.*the top 10.*score the edited data"):
        edit(
            EditConfig(
                scores=path, out=str(tmp_path / "b.parquet"), action="filter", rule=SelectionRule(k=10), data=first.out
            )
        )
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DataMismatchError, match="is not the data"):
        edit(
            EditConfig(
                scores=path,
                out=str(tmp_path / "b.parquet"),
                action="filter",
                rule=SelectionRule(k=10),
                data=str(pair_files.write_parquet(other, ROWS[::-1])),
            )
        )
    assert not (tmp_path / "b.parquet").exists()


def test_data_with_other_columns_is_not_the_data_that_the_scores_rank(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    path = write_scored(tmp_path / "s.parquet", pair_files.write_jsonl(tmp_path, rows), np.linspace(-1, 1, 20))
    other = tmp_path / "other.jsonl"
    other.write_text('{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "x"}\n' * 20)
    config = {"scores": path, "out": str(tmp_path / "b.parquet"), "action": "filter", "rule": SelectionRule(k=1)}
    with pytest.raises(DataMismatchError) as caught:
        edit(EditConfig(**config, data=str(other)))
    message = str(caught.value)
    assert f"{other} is not the data behind {path}: expected is standard (" in message
    assert "prompt in 'prompt'" in message
    assert message.endswith("its columns are chosen, rejected") and "option" not in message
    other.write_text("{")
    with pytest.raises(DataFormatError, match=r"other.jsonl"):
        edit(EditConfig(**config, data=str(other)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "filter", "rule": SelectionRule(k=N)}, "only 2499 of 2500 pairs have a rank"),
        ({"action": "filter", "rule": SelectionRule(threshold=1.0)}, "takes no pair: the highest score is"),
        ({"action": "drop-sources", "drop": ("set-9",)}, "'set-9', which no pair has as source; there is: 'set-0'"),
        ({"action": "drop-sources", "drop": ("set-0", "set-1", "set-2")}, "would remove all 2500 pairs"),
        ({"action": "drop-sources", "rule": SelectionRule(k=50), "min_lift": 9.0}, "nothing to drop"),
        ({"action": "drop-sources", "drop": ("x",), "by": "modell"}, "no column of the data; there is: prompt"),
        ({"action": "drop-sources", "drop": ("x",), "by": "chosen"}, "expected a column of plain values"),
    ],
)
def test_edits_that_cannot_be_made(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, data, any_scores(), **settings)
    assert not (tmp_path / "edited.parquet").exists() and not (tmp_path / "edited.changes.parquet").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "delete", "rule": SelectionRule(k=1)}, "'delete'; expected one of filter, swap, drop-sources"),
        ({"action": "filter"}, "expected one of -k"),
        ({"action": "filter", "rule": SelectionRule(k=1), "by": "x"}, "belong to --drop-sources"),
        ({"action": "drop-sources", "rule": SelectionRule(k=1), "drop": ("x",)}, "give one"),
        ({"action": "filter", "rule": SelectionRule(k=1), "out": "x.jsonl"}, "ends in .parquet"),
    ],
)
def test_contradicting_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EditConfig(**{"scores": "s.parquet", "out": "x.parquet", **settings})


def test_sides_of_different_types_are_not_swapped(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"q {i} a", "rejected": f"q {i} b", "score_chosen": i, "score_rejected": f"{i}"} for i in range(20)
    ]
    data = pair_files.write_parquet(tmp_path, rows)
    with pytest.raises(ConfigError, match="'score_chosen' has type int64, but 'score_rejected' has string"):
        run(tmp_path, data, np.linspace(-1, 1, 20), "swap", SelectionRule(k=2))


def test_the_data_is_not_overwritten(tmp_path: Path) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    path = write_scored(tmp_path / "scores.parquet", data, any_scores())
    with pytest.raises(ConfigError, match="would overwrite or join the data"):
        edit(EditConfig(scores=path, out=str(data), action="filter", rule=SelectionRule(k=10)))
    parts = pair_files.write_directory(tmp_path, ROWS)
    path = write_scored(tmp_path / "scores.parquet", parts, any_scores())
    with pytest.raises(ConfigError, match="would overwrite or join the data"):
        edit(EditConfig(scores=path, out=str(parts / "edited.parquet"), action="filter", rule=SelectionRule(k=10)))


def test_scores_and_store_are_not_overwritten(tmp_path: Path) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = write_scored(tmp_path / "hs.changes.parquet", data, any_scores())
    store = tmp_path / "acts.zarr"
    store.mkdir()
    whole = Path(scores).read_bytes()
    for out, what in (
        ("hs.changes.parquet", r"--out .* the scores"),
        ("x/../hs.changes.parquet", r"--out .* the scores"),
        ("hs.parquet", r"the change record .* the scores"),
        ("acts.zarr/clean.parquet", r"--out .* the activation store"),
    ):
        with pytest.raises(ConfigError, match=f"{what} .*; choose another --out"):
            edit(
                EditConfig(
                    scores=scores, out=str(tmp_path / out), action="filter", rule=SelectionRule(k=1), store=str(store)
                )
            )
    assert Path(scores).read_bytes() == whole and not list(store.iterdir())


def test_nothing_but_rows_without_a_score_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data, any_scores(), "filter", SelectionRule(fraction=0.99))
    assert "without a score" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run(tmp_path, data, any_scores(), "filter", SelectionRule(fraction=1))
    assert "removes every pair that has a rank: what stays are the 1 rows without a score" in caplog.text


def test_an_interrupted_edit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("pairtrace.engine.edit.keep_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, any_scores(), "filter", SelectionRule(k=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.parquet", "scores.parquet"]


def test_json_columns_of_two_kinds_are_refused_with_their_rows(tmp_path: Path) -> None:
    rows = [{"chosen": f"q {i} a", "rejected": f"q {i} b", "note": i if i < 1500 else {"x": i}} for i in range(1600)]
    with pytest.raises(DataFormatError, match="rows 1024 to 1599: column 'note' cannot be kept as one type"):
        run(tmp_path, pair_files.write_jsonl(tmp_path, rows), np.linspace(-1, 1, 1600), "filter", SelectionRule(k=2))


def test_columns_that_appear_late_or_grow_wider_are_kept(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"q {i} a", "rejected": f"q {i} b", "n": i if i < 1500 else i + 0.5}
        | ({"late": "x"} if i > 1200 else {})
        for i in range(1600)
    ]
    scores = np.linspace(-1, 1, 1600)
    run(tmp_path, pair_files.write_jsonl(tmp_path, rows), scores, "filter", SelectionRule(k=2))
    assert written(tmp_path) == [{"late": None, **row, "n": float(row["n"])} for row in rows[:-2]]


def test_row_groups_stay_small_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edited_rows, "ROW_GROUP_ROWS", 600)
    data = pair_files.write_jsonl(tmp_path, ROWS)
    run(tmp_path, data, any_scores(), "filter", SelectionRule(k=10))
    file = pq.ParquetFile(tmp_path / "edited.parquet")
    assert file.metadata.num_rows == N - 10 and file.num_row_groups >= 3


class TestRestore:
    def edited(self, tmp_path: Path, name: str, k: int) -> str:
        data = tmp_path / "rows.parquet"
        if not data.exists():
            pair_files.write_parquet(tmp_path, ROWS)
        path = write_scored(tmp_path / "scores.parquet", data, any_scores())
        out = str(tmp_path / f"{name}.parquet")
        edit(EditConfig(scores=path, out=out, action="filter", rule=SelectionRule(k=k)))
        return out

    def test_the_record_of_another_edit_is_refused(self, tmp_path: Path) -> None:
        one, two = self.edited(tmp_path, "one", 10), self.edited(tmp_path, "two", 20)
        with pytest.raises(DataMismatchError, match="record of another edit"):
            restore(one, str(tmp_path / "x.parquet"), two.replace(".parquet", ".changes.parquet"))

    def test_what_is_not_edited_data_is_refused(self, tmp_path: Path) -> None:
        one = self.edited(tmp_path, "one", 10)
        changes = one.replace(".parquet", ".changes.parquet")
        with pytest.raises(DataMismatchError, match="not written by pairtrace edit"):
            restore(str(tmp_path / "rows.parquet"), str(tmp_path / "x.parquet"), changes)
        with pytest.raises(DataFormatError, match="is not a change record"):
            restore(one, str(tmp_path / "x.parquet"), one)
        with pytest.raises(DataError, match="cannot read the change record"):
            restore(one, str(tmp_path / "x.parquet"), str(tmp_path / "absent.parquet"))
        with pytest.raises(ConfigError, match="one of the inputs"):
            restore(one, one)

    def test_rows_missing_from_the_edited_file_are_noticed(self, tmp_path: Path) -> None:
        one = self.edited(tmp_path, "one", 10)
        whole = pq.read_table(one)
        pq.write_table(whole.slice(0, len(whole) - 1), one)
        with pytest.raises(DataMismatchError, match="1 rows that the change record accounts for are not there"):
            restore(one, str(tmp_path / "x.parquet"))
        pq.write_table(pa.concat_tables([whole, whole.slice(0, 1)]), one)
        with pytest.raises(DataMismatchError, match="has more rows than its change record"):
            restore(one, str(tmp_path / "x.parquet"))
        assert not (tmp_path / "x.parquet").exists()
