from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine.judge import RuleJudge
from pairtrace.engine.prompts import load_prompts
from pairtrace.engine.rollout_file import read_rollouts
from pairtrace.engine.rollout_table import SCHEMA, RolloutTable
from pairtrace.errors import DataFormatError, DataMismatchError

PROMPTS = [
    {"id": "a", "prompt": "Hello", "distractor": "Answer in three words."},
    {"id": "b", "prompt": "How do I clean a car?", "distractor": "Be brief."},
]


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in PROMPTS))
    return str(path)


def test_judging_keeps_undecided_apart() -> None:
    table = pa.table({"model": ["base"] * 3, "prompt": ["p"] * 3, "response": ["Sure.", "", "Sorry"]})
    read = table_of(table)
    judged = read.judged(RuleJudge(label="t", refusal=("sorry",)))
    assert judged.verdicts().tolist() == [1, -1, 0]
    assert judged.table["verdict"].to_pylist() == [True, None, False]
    assert set(judged.table["judge"].to_pylist()) == {judged.manifest["judge"]}


def table_of(table: pa.Table, **options: Any) -> RolloutTable:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "user.parquet"
        pq.write_table(table, path)
        return read_rollouts(path, **options)


def test_a_users_own_file_is_read(tmp_path: Path, prompt_file: str) -> None:
    rows = [
        {"prompt_id": "a", "model": "M0", "response": "x", "condition": "plain", "harmful": 0},
        {"prompt_id": "a", "model": "tuned", "response": None, "condition": "distractor", "harmful": 1},
        {"prompt_id": "b", "model": "Base", "response": "z", "condition": "plain", "harmful": None},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = load_prompts(prompt_file)
    read = read_rollouts(path, prompts=prompts, label_column="harmful")
    assert read.strings("model").tolist() == ["base", "tuned", "base"]
    assert read.verdicts().tolist() == [0, 1, -1]
    assert read.strings("judge").tolist() == ["column:harmful", "column:harmful", ""]
    assert json.loads(read.strings("messages")[1]) == prompts.by_id()["a"].conversation("distractor")
    assert read.strings("response")[1] == ""
    unjudged = read_rollouts(path, prompts=prompts)
    assert not unjudged.has_verdicts
    with pytest.raises(DataFormatError, match="prompts are missing"):
        read_rollouts(path)


def test_messages_may_be_lists_and_ids_may_be_absent() -> None:
    conversation = [{"role": "user", "content": "p"}]
    both = pa.table({"model": ["M0", "M1"], "messages": [conversation] * 2, "response": ["a", "b"]})
    text = pa.table({"model": ["M0", "M1"], "messages": [json.dumps(conversation)] * 2, "response": ["a", "b"]})
    plain = pa.table({"model": ["M0", "M1"], "prompt": ["p", "p"], "response": ["a", "b"]})
    first, second, third = table_of(both), table_of(text), table_of(plain)
    assert first.table.equals(second.table)
    assert first.table.equals(third.table)
    assert len(set(first.strings("prompt_id"))) == 1


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"response": ["x"], "prompt": ["p"]}, {}, "no column 'model'; columns found: response, prompt"),
        ({"model": ["base"], "prompt": ["p"]}, {}, "no column 'response'"),
        ({"model": ["base"], "prompt": ["p"], "response": ["x"]}, {"label_column": "bad"}, "no column 'bad'"),
        ({"model": ["gpt"], "prompt": ["p"], "response": ["x"]}, {}, "row 0: model is 'gpt'"),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "condition": ["hot"]},
            {},
            "row 0: condition is 'hot'",
        ),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "label": [0.5]},
            {"label_column": "label"},
            "row 0: label is 0.5",
        ),
        ({"model": ["base"], "messages": ["not json"], "response": ["x"]}, {}, "row 0: 'messages' is neither"),
        (
            {"model": ["base"], "prompt": ["p"], "response": ["x"], "condition": ["distractor"]},
            {},
            "need a column 'prompt_id'",
        ),
    ],
)
def test_bad_rollout_files_are_refused(columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        table_of(pa.table(columns), **options)


def test_unknown_ids_broken_lines_and_empty_files_are_refused(tmp_path: Path, prompt_file: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt_id": "zzz", "model": "base", "response": "x"}\n')
    with pytest.raises(DataMismatchError, match="'zzz'"):
        read_rollouts(path, prompts=load_prompts(prompt_file))
    path.write_text('{"prompt": "a", "model": "base", "response": "x"}\n{"prompt\n')
    with pytest.raises(DataFormatError, match="line 2: invalid JSON"):
        read_rollouts(path)
    path.write_text("")
    with pytest.raises(DataFormatError, match="no rollouts"):
        read_rollouts(path)
    with pytest.raises(DataFormatError, match="cannot read"):
        read_rollouts(tmp_path / "absent.parquet")


def own_file(path: Path, **extra: list[Any]) -> Path:
    """A file as `behavior` writes it, with further columns."""
    row = {
        "prompt_id": "a", "condition": "plain", "sample": 0, "response": "x", "tokens": 1, "finished": True,
        "messages": json.dumps([{"role": "user", "content": "p"}]), "verdict": True, "judge": "rules:1", "seed": 5,
    }  # fmt: skip
    table = pa.Table.from_pylist([{**row, "model": "base"}, {**row, "model": "tuned"}], schema=SCHEMA)
    RolloutTable(table, {"identity": {"base_fingerprint": "f" * 64}, "judge": "rules:1"}).write(path)
    written = pq.read_table(path)
    for name, values in extra.items():
        written = written.append_column(name, pa.array(values))
    pq.write_table(written, path)
    return path


def test_labels_in_our_own_file_do_not_erase_how_it_was_made(tmp_path: Path) -> None:
    path = own_file(tmp_path / "r.parquet", human=[0, None])
    assert read_rollouts(path).verdicts().tolist() == [1, 1]
    labelled = read_rollouts(path, label_column="human")
    assert labelled.verdicts().tolist() == [0, -1]
    assert labelled.manifest == {"identity": {"base_fingerprint": "f" * 64}, "judge": "column:human"}
    assert labelled.table["seed"].to_pylist() == [5, 5]
    with pytest.raises(DataFormatError, match="no column 'absent'"):
        read_rollouts(path, label_column="absent")
    with pytest.raises(DataFormatError, match=r"row 1: human is 2"):
        read_rollouts(own_file(tmp_path / "bad.parquet", human=[0, 2]), label_column="human")


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"identity": 3}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, metadata: bytes) -> None:
    path = own_file(tmp_path / "r.parquet")
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"pairtrace": metadata}), path)
    with pytest.raises(DataFormatError, match="is damaged"):
        read_rollouts(path)


def test_our_own_file_with_a_changed_column_is_refused(tmp_path: Path) -> None:
    path = own_file(tmp_path / "r.parquet")
    table = pq.read_table(path)
    index = table.schema.get_field_index("sample")
    pq.write_table(table.set_column(index, "sample", pa.array(["one", "two"])), path)
    with pytest.raises(DataFormatError, match="changed after it was written"):
        read_rollouts(path)


GOOD = {"model": "base", "prompt_id": "a", "prompt": "p", "response": "x", "sample": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "prompt is None; expected text"),
        ({"prompt": 3}, "prompt is 3; expected text"),
        ({"prompt_id": None}, "prompt_id is None; expected text or a whole number"),
        ({"prompt_id": 1.5}, "prompt_id is 1.5"),
        ({"prompt_id": True}, "prompt_id is True"),
        ({"response": 5}, "response is 5; expected text"),
        ({"sample": "one"}, "sample is 'one'; expected a whole number"),
        ({"sample": 0.5}, "sample is 0.5"),
    ],
)
def test_values_of_another_type_are_refused_with_the_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n")
    with pytest.raises(DataFormatError, match=f"line 2: {message}"):
        read_rollouts(path)
    # In parquet a column has one type: the other row has the odd value too, or none.
    name = next(iter(change))
    rows = [GOOD, {**GOOD, **change}] if change[name] is None else [{**GOOD, **change}] * 2
    number = 1 if change[name] is None else 0
    with pytest.raises(DataFormatError, match=f"row {number}: {message}"):
        table_of(pa.Table.from_pylist(rows))


def test_ids_may_be_whole_numbers_and_are_text_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({**GOOD, "prompt_id": 7}) + "\n" + json.dumps({**GOOD, "prompt_id": "a"}) + "\n")
    assert read_rollouts(path).strings("prompt_id").tolist() == ["7", "a"]
    assert table_of(pa.Table.from_pylist([{**GOOD, "prompt_id": 7}])).strings("prompt_id").tolist() == ["7"]


def test_columns_that_the_first_line_lacks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "label": 1}) + "\n")
    assert read_rollouts(path, label_column="label").verdicts().tolist() == [-1, 1]


@pytest.mark.parametrize("kept", [15, -3])
def test_a_cut_gzip_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 50)[:kept])
    with pytest.raises(DataFormatError, match="cannot read the rollouts file"):
        read_rollouts(path)


def test_a_cut_file_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataFormatError, match=r"cut\.parquet: .*delete it to ask the models again"):
        read_rollouts(tmp_path / "cut.parquet")
    for name in ("absent.parquet", "absent.jsonl"):
        with pytest.raises(DataFormatError, match=rf"{name}: there is no such file$"):
            read_rollouts(tmp_path / name)


def test_damaged_gzip_content_is_refused(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress((json.dumps(GOOD) + "\n").encode() * 50))
    whole[10:20] = b"\xff" * 10
    (tmp_path / "mine.jsonl.gz").write_bytes(whole)
    with pytest.raises(DataFormatError, match="cannot read the rollouts file"):
        read_rollouts(tmp_path / "mine.jsonl.gz")
