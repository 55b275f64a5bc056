"""Damaged, empty or absent input is named: the file, and the line, row or column."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import json_rows, json_tables
from pairtrace.engine.pairs import open_pairs
from pairtrace.errors import ConfigError, DataError, DataFormatError
from tests.engine.pair_files import ROWS, lines, write_directory, write_jsonl, write_parquet


class TestDamage:
    """Every message names the file, and the line, row or column."""

    def write(self, tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (b'{"chosen": "a\xff"}\n', r"rows.jsonl, line 3: not valid UTF-8 \(byte 0xff\)"),
            (b'{"chosen": "a", }\n', r"rows.jsonl, line 3: not valid JSON: .* at column 17"),
            (b'{"chosen": "a"\n', r"rows.jsonl, line 3: not valid JSON"),
            (b'["chosen"]\n', r"rows.jsonl, line 3: expected an object .* found a list"),
            (b"null\n", r"rows.jsonl, line 3: expected an object .* found null"),
            (b"[" * 100_000 + b"\n", r"rows.jsonl, line 3: not usable JSON: nested too deeply"),
        ],
    )
    def test_bad_line(self, tmp_path: Path, bad: bytes, message: str) -> None:
        good = lines(ROWS[:1]).encode()
        with pytest.raises(DataFormatError, match=message):
            open_pairs(self.write(tmp_path, good + b"\n" + bad + good))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'[\n{"a": 1},\n{"a": \xff}]', r"rows.json, line 3: not valid UTF-8"),
            (b'[\n{"a": 1},\n\n{"a": \n tru}]', r"rows.json, element 2 \(line 5\): not valid JSON: Expecting value"),
            (b'[{"a": 1}\n{"a": 2}]', r"rows.json, line 2: expected ',' or '\]' after element 1, but found '\{'"),
            (b'[{"a": 1},\n{"a": 2}', r"rows.json, line 2: .* after element 2, but the file ends: it is cut short"),
            (b'[{"a": 1},\n{"a": "2', r"rows.json, element 2 \(line 2\): not valid JSON: Unterminated string"),
            (b'[{"a": 1}, 7]', r"rows.json, element 2 \(line 1\): expected an object .* found a bare value"),
            (b'[{"a": 1}]\n[{"a": 2}]', r"rows.json, line 2: there is text after the end of the array"),
            (b'{\n "train": []}', r"rows.json: this is one JSON object over several lines"),
            (b"[]", r"is empty: it holds no rows"),
        ],
    )
    def test_bad_array(self, tmp_path: Path, content: bytes, message: str) -> None:
        with pytest.raises(DataFormatError, match=message):
            open_pairs(self.write(tmp_path, content, "rows.json"))

    def test_a_bad_element_is_found_without_reading_the_rest(self, tmp_path: Path) -> None:
        element = json.dumps(ROWS[0]).encode()
        path = self.write(tmp_path, b"[" + b'{"a": nul},' + (element + b",\n") * 60_000 + element + b"]", "rows.json")
        tracemalloc.start()
        with pytest.raises(DataFormatError, match="element 1 "):
            open_pairs(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert path.stat().st_size > 10_000_000 > peak

    @pytest.mark.parametrize("chunk", [1, 7, 64])
    def test_elements_are_found_whatever_the_window(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        monkeypatch.setattr(json_rows, "_CHUNK", chunk)
        rows = [{**row, "extra": [True, None, -1.5e-7, 12345678901234567890, '\\"]},{[é\u2028']} for row in ROWS[:12]]
        path = tmp_path / "rows.json"
        path.write_text(
            "\ufeff" + json.dumps(rows, ensure_ascii=chunk == 7, indent=chunk % 3 or None), encoding="utf-8"
        )
        table = json_tables.JsonTable(path)
        assert list(table.read(0, 99, table.columns)) == rows
        assert table.columns == (*ROWS[0], "extra")

    def test_empty_file(self, tmp_path: Path) -> None:
        for name in ("rows.jsonl", "rows.json"):
            with pytest.raises(DataFormatError, match="is empty: it holds no rows"):
                open_pairs(self.write(tmp_path, b"\n \n", name))
        empty = pa.table({"chosen": pa.array([], pa.string()), "rejected": pa.array([], pa.string())})
        pq.write_table(empty, tmp_path / "empty.parquet")
        with pytest.raises(DataFormatError, match=r"empty\.parquet is empty"):
            open_pairs(tmp_path / "empty.parquet")
        (tmp_path / "nothing").mkdir()
        with pytest.raises(DataFormatError, match="holds no data files"):
            open_pairs(tmp_path / "nothing")

    def test_missing_columns(self, tmp_path: Path) -> None:
        rows = [{"question": "a", "good": "b", "bad": "c"}]
        for path in (write_jsonl(tmp_path, rows), write_parquet(tmp_path, rows)):
            with pytest.raises(DataFormatError, match=r"'chosen' .*--chosen.*columns found: question, good, bad"):
                open_pairs(path)

    def test_a_file_of_a_directory_lacks_a_column(self, tmp_path: Path) -> None:
        directory = write_directory(tmp_path, ROWS[:4])
        pq.write_table(pa.table({"prompt": ["a"]}), directory / "part-2.parquet")
        with pytest.raises(DataFormatError, match=r"part-2.parquet lacks the columns chosen, rejected, source"):
            open_pairs(directory)

    @pytest.mark.parametrize("cut", [1, 100, 8])
    def test_gzip_cut_short(self, tmp_path: Path, cut: int) -> None:
        content = gzip.compress(lines(ROWS).encode())
        with pytest.raises(DataFormatError, match="gzip stream is damaged or cut short"):
            open_pairs(self.write(tmp_path, content[: len(content) // cut - 9], "rows.jsonl.gz"))

    def test_damaged_parquet_and_arrow(self, tmp_path: Path) -> None:
        with pytest.raises(DataFormatError, match=r"rows\.parquet: not a readable parquet file"):
            open_pairs(self.write(tmp_path, b"PAR1 nonsense", "rows.parquet"))
        with pytest.raises(DataFormatError, match=r"rows\.arrow: not a readable Arrow file"):
            open_pairs(self.write(tmp_path, b"nonsense" * 9, "rows.arrow"))
        (tmp_path / "saved").mkdir()
        self.write(tmp_path / "saved", b'{"x": 1}', "state.json")
        with pytest.raises(DataFormatError, match=r"state.json does not list the data files"):
            open_pairs(tmp_path / "saved")

    def test_parquet_page_damaged_after_opening(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path, ROWS)
        source = open_pairs(path)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4000] = b"\xff" * 4000
        path.write_bytes(content)
        with pytest.raises(DataFormatError, match=r"rows.parquet: rows 0 to 2499 are damaged"):
            list(source.read())

    def test_text_that_is_not_utf8_is_one_bad_row(self, tmp_path: Path) -> None:
        texts = [b"The sky is blue.", b"The sky is \xff\xfe", b"The sky is red."]
        chosen = pa.array(texts, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"chosen": chosen, "rejected": ["The sky is green."] * 3}), tmp_path / "rows.parquet")
        pairs = list(open_pairs(tmp_path / "rows.parquet").read())
        assert [bool(pair.problem) for pair in pairs] == [False, True, False]
        assert "not valid UTF-8" in pairs[1].problem
        assert (pairs[2].prompt, pairs[2].chosen) == ("The sky is", " red.")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nowhere.jsonl", "no file or directory"),
            ("some/where/deep.parquet", "no file or directory"),
            ("org/rows.jsonl", "no file or directory"),
        ],
    )
    def test_nothing_there(self, name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_pairs(name)

    def test_unknown_suffix_and_needless_split(self, tmp_path: Path) -> None:
        with pytest.raises(DataFormatError, match=r"the suffix '.csv' is not known"):
            open_pairs(self.write(tmp_path, b"a,b", "rows.csv"))
        with pytest.raises(ConfigError, match="single file, which has no split 'train'"):
            open_pairs(write_jsonl(tmp_path, ROWS[:2]), split="train")

    def test_two_kinds_of_files_in_a_directory(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path, ROWS[:2])
        write_parquet(tmp_path, ROWS[:2])
        with pytest.raises(DataFormatError, match="holds JSON or Arrow and parquet files"):
            open_pairs(tmp_path)
