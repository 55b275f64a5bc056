"""Pairs come out of every kind of file alike, in order, streamed, and damage is named."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import arrow_tables, inputs, json_rows
from pairtrace.engine.pairs import Pair, PairSource, open_pairs
from pairtrace.errors import ConfigError, DataError, DataFormatError, DataMismatchError, MissingDependencyError
from tests.engine import rendering_cases as cases
from tests.engine.pair_files import (
    ROWS,
    make_rows,
    write_arrow_file,
    write_directory,
    write_json,
    write_json_gz,
    write_jsonl,
    write_jsonl_gz,
    write_lines_named_json,
    write_parquet,
    write_saved,
    write_saved_dict,
)

WRITERS = [
    write_jsonl,
    write_jsonl_gz,
    write_json,
    write_json_gz,
    write_lines_named_json,
    write_parquet,
    write_saved,
    write_saved_dict,
    write_arrow_file,
    write_directory,
]


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__.removeprefix("write_"))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> PairSource:
    datasets.disable_progress_bars()
    return open_pairs(request.param(tmp_path, ROWS))


class TestEveryKindOfFile:
    def test_all_rows_in_order(self, source: PairSource) -> None:
        assert source.rows == len(ROWS)
        pairs = list(source.read())
        expected = [Pair(i, row["prompt"], row["chosen"], row["rejected"], row["source"]) for i, row in enumerate(ROWS)]
        assert pairs == expected
        assert list(source.iter_sources()) == [row["source"] for row in ROWS]

    @pytest.mark.parametrize(
        "bounds", [(0, 1), (1023, 1025), (1400, 1900), (2047, 2500), (2499, 9999), (5, 5), (2500, 2600)]
    )
    def test_any_stretch(self, source: PairSource, bounds: tuple[int, int]) -> None:
        start, stop = bounds
        pairs = list(source.read(start, stop))
        assert [pair.row for pair in pairs] == list(range(start, min(stop, 2500)))
        assert [pair.chosen for pair in pairs] == [row["chosen"] for row in ROWS[start:stop]]

    def test_single_rows_in_any_order(self, source: PairSource) -> None:
        wanted = [2499, 0, 1024, 1023, 700, 0, 1250]
        assert [(pair.row, pair.rejected) for pair in source.take(wanted)] == [(i, ROWS[i]["rejected"]) for i in wanted]
        assert source.take([]) == []

    def test_description(self, source: PairSource) -> None:
        columns = "columns prompt, chosen, rejected; source column source"
        assert source.describe() == f"conversational: messages, explicit prompt; 2,500 rows; {columns}"


class TestOptions:
    def test_limit(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path, ROWS)
        source = open_pairs(path, limit=1000)
        assert source.rows == 1000 and len(list(source.read())) == 1000 and len(list(source.iter_sources())) == 1000
        assert "first 1,000 of 2,500 rows" in source.describe()
        assert open_pairs(path, limit=9999).rows == 2500
        with pytest.raises(DataMismatchError, match=r"row 1000 was asked for.*rows 0 to 999"):
            source.take([3, 1000])
        with pytest.raises(ConfigError, match="limit is 0"):
            open_pairs(path, limit=0)

    def test_fingerprint(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path, ROWS[:50])
        base = open_pairs(path).fingerprint
        assert len(base) == 64 and open_pairs(path, limit=7).fingerprint == base
        assert open_pairs(write_jsonl_gz(tmp_path, ROWS[:50])).fingerprint == base, "the same content, compressed"
        assert open_pairs(path, source="source").fingerprint == base
        assert open_pairs(path, chosen="rejected", rejected="chosen").fingerprint != base
        assert open_pairs(path, format="conversational-implicit").fingerprint != base
        changed = [*ROWS[:49], {**ROWS[49], "rejected": [{"role": "assistant", "content": "bad 49"}]}]
        assert open_pairs(write_jsonl(tmp_path, changed)).fingerprint != base

    def test_fingerprint_of_a_directory_follows_the_order(self, tmp_path: Path) -> None:
        directory = write_directory(tmp_path, ROWS[:20])
        base = open_pairs(directory).fingerprint
        (directory / "part-0.parquet").rename(directory / "part-2.parquet")
        assert open_pairs(directory).fingerprint != base

    def test_splits_of_a_saved_dictionary(self, tmp_path: Path) -> None:
        datasets.disable_progress_bars()
        both = {name: datasets.Dataset.from_list(ROWS[:count]) for name, count in (("train", 30), ("test", 10))}
        datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
        with pytest.raises(DataFormatError, match="no split was chosen; choose with --split: train, test"):
            open_pairs(tmp_path / "both")
        with pytest.raises(DataFormatError, match="there is no split 'dev'; choose with --split: train, test"):
            open_pairs(tmp_path / "both", split="dev")
        assert open_pairs(tmp_path / "both", split="test").rows == 10
        with pytest.raises(ConfigError, match="one data set, which has no split 'test'"):
            open_pairs(tmp_path / "both" / "test", split="test")

    def test_splits_of_a_directory_of_files(self, tmp_path: Path) -> None:
        for name, count in (("train-00000-of-00001", 30), ("test-00000-of-00001", 10)):
            pq.write_table(pa.Table.from_pylist(ROWS[:count]), tmp_path / f"{name}.parquet")
        assert open_pairs(tmp_path, split="test").rows == 10
        with pytest.raises(DataFormatError, match="no data files for split 'dev'"):
            open_pairs(tmp_path, split="dev")

    def test_the_file_is_the_source_where_there_are_several(self, tmp_path: Path) -> None:
        plain = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS[:4]]
        source = open_pairs(write_directory(tmp_path, plain))
        assert list(source.iter_sources()) == ["part-0.parquet"] * 2 + ["part-1.parquet"] * 2
        assert [pair.source for pair in source.read()] == list(source.iter_sources())
        assert "source is the file name" in source.describe()
        alone = open_pairs(tmp_path / "parts" / "part-0.parquet")
        assert list(alone.iter_sources()) == ["", ""] and "no source column" in alone.describe()


class TestHub:
    """The hub is not reachable from the tests: `datasets.load_dataset` is replaced by local data."""

    @pytest.fixture
    def loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        asked: list[str] = []
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "cache")

        def load_dataset(identifier: str) -> Any:
            asked.append(identifier)
            return datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "cache"))})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    @pytest.mark.parametrize("name", ["org/name", "hf://org/name", "hf://datasets/org/name"])
    def test_rows(self, loaded: list[str], name: str) -> None:
        source = open_pairs(name)
        assert loaded == ["org/name"] and source.rows == 2500
        assert [pair.chosen for pair in source.read(1000, 2100)] == [row["chosen"] for row in ROWS[1000:2100]]
        assert source.take([2400])[0].prompt == ROWS[2400]["prompt"]
        assert len(source.fingerprint) == 64

    def test_data_held_in_memory_has_a_fingerprint_of_its_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fingerprint(rows: Sequence[Any]) -> str:
            loaded = datasets.DatasetDict({"train": datasets.Dataset.from_list(list(rows))})
            monkeypatch.setattr(datasets, "load_dataset", lambda identifier: loaded)
            return open_pairs("org/name").fingerprint

        assert fingerprint(ROWS[:5]) == fingerprint(ROWS[:5]) != fingerprint(ROWS[1:6])

    def test_a_data_set_that_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(identifier: str) -> Any:
            raise datasets.exceptions.DatasetNotFoundError(f"{identifier} doesn't exist")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(DataError, match=r"'org/name' is neither a local file or directory nor .* doesn't exist"):
            open_pairs("org/name")

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'pairtrace\[train\]'"):
            open_pairs("org/name")


class TestStreaming:
    def test_reading_holds_a_batch_not_the_file(self, tmp_path: Path) -> None:
        rows = make_rows(5_000)
        for path in (write_parquet(tmp_path, rows), write_jsonl(tmp_path, rows), write_json(tmp_path, rows)):
            peaks = []
            for count in (1_100, 5_000):
                source = open_pairs(path, limit=count)
                tracemalloc.start()
                assert sum(1 for _ in source.read()) == count
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
            assert peaks[1] < 1.3 * peaks[0] + 500_000, (path.name, peaks)

    def test_only_the_wanted_row_groups_are_decoded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_pairs(write_parquet(tmp_path, ROWS))
        decoded: list[int] = []
        original = arrow_tables.batch_records

        def counting(batch: Any) -> Any:
            decoded.append(batch.num_rows)
            return original(batch)

        monkeypatch.setattr(arrow_tables, "batch_records", counting)
        assert source.take([1405])[0].row == 1405
        assert decoded == [1], "one row, out of the third row group"

    def test_a_reader_is_lazy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = open_pairs(write_jsonl(tmp_path, ROWS))
        parsed = 0
        original = json_rows._require_object

        def counting(value: Any, where: str) -> Any:
            nonlocal parsed
            parsed += 1
            return original(value, where)

        monkeypatch.setattr(json_rows, "_require_object", counting)
        reader = source.read(1030)
        assert parsed == 0
        next(reader)
        assert parsed == 7, "reading starts at the block that begins with row 1024"

    def test_importing_needs_no_model_library(self) -> None:
        import subprocess
        import sys

        code = (
            "import sys, pairtrace.engine.pairs, pairtrace.engine.rendering;"
            "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules])"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == "[]"


@cases.needs_shared_data
class TestSharedFiles:
    """Rendering all their rows is tested in test_rendering.py."""

    @pytest.mark.parametrize(
        ("path", "rows", "description"),
        [
            (cases.HH, 2312, "hh-rlhf: text dialogues, implicit prompt; 2,312 rows; columns chosen, rejected"),
            (cases.SHAREGPT, 300, "sharegpt: messages with from and value; 300 rows; columns conversations, chosen"),
        ],
    )
    def test_every_row_is_a_pair(self, path: Path, rows: int, description: str) -> None:
        source = open_pairs(path)
        assert source.rows == rows and source.describe().startswith(description)
        pairs = list(source.read())
        assert [pair.row for pair in pairs] == list(range(rows))
        assert not any(pair.problem for pair in pairs)


def test_the_hub_id_pattern_takes_no_paths() -> None:
    assert inputs._HUB_ID.fullmatch("trl-lib/ultrafeedback_binarized")
    assert not inputs._HUB_ID.fullmatch("a/b/c") and not inputs._HUB_ID.fullmatch("./data.bin/")
