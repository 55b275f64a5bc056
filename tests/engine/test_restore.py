"""`restore` gives the original rows back or refuses: damaged, changed and foreign files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairtrace.engine import change_record
from pairtrace.engine.edit import edit
from pairtrace.engine.edit_config import EditConfig
from pairtrace.engine.restore import restore
from pairtrace.engine.selection import SelectionRule
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError, PairtraceError
from tests.engine import pair_files
from tests.engine.scored_files import write_scored

ROWS: list[dict[str, Any]] = [
    {**row, "weight": row_number / 7} for row_number, row in enumerate(pair_files.make_rows(120))
]


@pytest.fixture(params=["filter", "swap"])
def edited(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = write_scored(tmp_path / "scores.parquet", data, np.linspace(-0.9, 0.9, len(ROWS)))
    out = tmp_path / "edited.parquet"
    edit(EditConfig(scores=scores, out=str(out), action=request.param, rule=SelectionRule(k=30)))
    return out


def changes_of(edited: Path) -> Path:
    return edited.with_suffix(".changes.parquet")


def restored(edited: Path) -> pa.Table:
    out = edited.with_name("restored.parquet")
    out.unlink(missing_ok=True)
    restore(str(edited), str(out))
    return pq.read_table(out)


def rewrite(path: Path, table: pa.Table, **late: str) -> None:
    """Write a table with other values and everything else as it was."""
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(late)


@pytest.mark.parametrize("edited", ["filter"], indirect=True)
@pytest.mark.parametrize("which", ["record", "data"])
def test_no_flipped_bit_gives_wrong_rows(edited: Path, which: str) -> None:
    expected = restored(edited)
    assert expected.equals(pq.read_table(edited.with_name("rows.parquet")))
    path = changes_of(edited) if which == "record" else edited
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    # Values, and the footer on its own: there parquet has no checksums.
    places = [*rng.integers(0, len(whole), 40), *rng.integers(len(whole) - 3000, len(whole), 30)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            table = restored(edited)
        except PairtraceError:
            refused += 1
            assert not edited.with_name("restored.parquet").exists()
        else:
            assert table.equals(expected) and table.schema.metadata == expected.schema.metadata, place
    # Every byte of the record counts; of the data those that do not matter for its rows may be wrong.
    assert refused == len(places) if which == "record" else refused > 30
    path.write_bytes(whole)
    assert restored(edited).equals(expected)


def test_an_edited_file_that_was_changed_is_named(edited: Path) -> None:
    table = pq.read_table(edited)
    texts: list[Any] = table.column("chosen").to_pylist()
    texts[3][-1]["content"] += "!"
    place = table.schema.get_field_index("chosen")
    tampered = table.set_column(place, table.schema.field(place), pa.array(texts, table.schema.field(place).type))
    rewrite(edited, tampered)
    with pytest.raises(DataMismatchError, match=rf"{edited} was changed or damaged since the edit"):
        restored(edited)
    assert not edited.with_name("restored.parquet").exists()
    renamed = table.rename_columns([name.upper() for name in table.schema.names])
    rewrite(edited, renamed.replace_schema_metadata(table.schema.metadata))
    with pytest.raises(DataMismatchError, match=rf"{edited} was changed since the edit: the columns are PROMPT"):
        restored(edited)


def test_the_same_rows_in_other_row_groups_are_restored(edited: Path) -> None:
    expected = restored(edited)
    pq.write_table(pq.read_table(edited), edited, row_group_size=11, compression="zstd")
    assert restored(edited).equals(expected)


@pytest.mark.parametrize("edited", ["filter"], indirect=True)
def test_a_record_that_was_changed_is_refused_with_and_without_its_digest(edited: Path) -> None:
    record = pq.read_table(changes_of(edited))
    late = change_record.file_metadata(changes_of(edited))
    digests = {"pairtrace_digests": late[change_record.DIGESTS_KEY].decode()}
    reason = record.schema.get_field_index("row")
    other = record.set_column(reason, record.schema.field(reason), pa.array([*range(29), 119]))
    rewrite(changes_of(edited), other, **digests)
    with pytest.raises(DataFormatError, match="is damaged or was changed: it is not as edit wrote it"):
        restored(edited)
    # Data that another program has written again does not know its record any more: the rows tell.
    pq.write_table(pq.read_table(edited), edited)
    with pytest.raises(DataMismatchError, match="do not give the original data back"):
        restored(edited)
    rewrite(changes_of(edited), other)
    with pytest.raises(DataFormatError, match=r"is damaged: its metadata.*pairtrace_digests"):
        restored(edited)


@pytest.mark.parametrize("edited", ["filter"], indirect=True)
def test_a_comparison_that_is_left_out_would_be_noticed(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pq.read_table(edited)
    rewrite(edited, table.take(np.roll(np.arange(len(table)), 1)))
    monkeypatch.setattr("pairtrace.engine.restore._compare", lambda *args, **digests: None)
    assert not restored(edited).equals(pq.read_table(edited.with_name("rows.parquet")))
    monkeypatch.undo()
    with pytest.raises(DataMismatchError):
        restored(edited)


def test_records_of_the_first_version_are_restored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = pair_files.write_parquet(tmp_path, ROWS)
    scores = write_scored(tmp_path / "scores.parquet", data, np.linspace(-0.9, 0.9, len(ROWS)))
    out = tmp_path / "edited.parquet"
    with monkeypatch.context() as older:
        older.setattr("pairtrace.engine.edit.SCHEMA_VERSION", 1)
        older.setattr("pairtrace.engine.edited_rows.RowWriter.annotate", lambda self, entries: None)
        edit(EditConfig(scores=scores, out=str(out), action="filter", rule=SelectionRule(k=30)))
    with caplog.at_level(logging.WARNING):
        assert restored(out).equals(pq.read_table(data))
    assert "older version without digests" in caplog.text


@pytest.mark.parametrize("edited", ["filter"], indirect=True)
def test_metadata_that_cannot_be_read_is_an_error_with_words(edited: Path) -> None:
    record = pq.read_table(changes_of(edited))
    whole = dict(record.schema.metadata)
    damaged: list[tuple[bytes, bytes]] = [
        (change_record.EDIT_KEY, b"{"),
        (change_record.EDIT_KEY, b"[]"),
        (change_record.EDIT_KEY, json.dumps({"schema_version": 2}).encode()),
        (change_record.EDIT_KEY, whole[change_record.EDIT_KEY].replace(b'"chosen": "chosen"', b'"chosen": "chosem"')),
        (change_record.SCHEMA_KEY, whole[change_record.SCHEMA_KEY][:40] + b"\xff" * 60),
    ]
    digests = change_record.file_metadata(changes_of(edited))[change_record.DIGESTS_KEY].decode()
    for key, value in damaged:
        rewrite(changes_of(edited), record.replace_schema_metadata({**whole, key: value}), pairtrace_digests=digests)
        with pytest.raises(DataFormatError, match="is damaged: its metadata cannot be read"):
            restored(edited)


@pytest.mark.parametrize("edited", ["filter"], indirect=True)
def test_wrong_arguments(edited: Path) -> None:
    out = str(edited.with_name("x.parquet"))
    with pytest.raises(DataMismatchError, match=rf"is a change record; give the edited data beside it, {edited}"):
        restore(str(changes_of(edited)), out)
    with pytest.raises(DataMismatchError, match=r"not written by pairtrace edit.*--changes"):
        restore(str(edited.with_name("rows.parquet")), out)
    with pytest.raises(ConfigError, match="one of the inputs"):
        restore(str(edited), str(edited.parent / "." / edited.parent.name / ".." / edited.name))
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        restore(str(edited), str(edited.with_name("x.jsonl")))
    with pytest.raises(DataFormatError, match=r"cannot read .*absent.parquet.*--changes"):
        restore(str(edited.with_name("absent.parquet")), out)
    changes_of(edited).rename(edited.with_name("moved.parquet"))
    with pytest.raises(DataFormatError, match=r"say where it is with --changes"):
        restore(str(edited), out)
    restore(str(edited), out, str(edited.with_name("moved.parquet")))


def test_types_that_parquet_keeps_wider_come_back(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    table = table.append_column("when", pa.array(range(len(ROWS)), pa.timestamp("s")))
    data = tmp_path / "rows.arrow"
    with pa.ipc.new_stream(str(data), table.schema) as stream:
        stream.write_table(table)
    scores = write_scored(tmp_path / "scores.parquet", data, np.linspace(-0.9, 0.9, len(ROWS)))
    out = tmp_path / "edited.parquet"
    edit(EditConfig(scores=scores, out=str(out), action="filter", rule=SelectionRule(k=30)))
    assert restored(out).cast(table.schema).equals(table)
