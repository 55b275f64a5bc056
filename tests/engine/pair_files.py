"""The same rows written as every kind of file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


def make_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}: é 漢字?"}],
            "chosen": [{"role": "assistant", "content": f"Good {i}\n" + "x" * (i % 50)}],
            "rejected": [{"role": "assistant", "content": f"Bad {i}"}],
            "source": f"set-{i % 3}",
        }
        for i in range(count)
    ]


ROWS = make_rows(2500)


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.jsonl"
    path.write_text(lines(rows), encoding="utf-8")
    return path


def write_jsonl_gz(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(rows).encode()))
    return path


def write_json(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def write_json_gz(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    return path


def write_lines_named_json(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.json"
    path.write_text("\ufeff" + lines(rows).replace("\n", "\r\n\r\n"), encoding="utf-8")
    return path


def write_parquet(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=700)
    return path


def write_saved(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "saved"
    datasets.Dataset.from_list(list(rows)).save_to_disk(path, num_shards=3)
    return path


def write_saved_dict(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(list(rows))}).save_to_disk(path)
    return path


def write_arrow_file(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "rows.arrow"
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=600)
    return path


def write_directory(directory: Path, rows: Sequence[Any]) -> Path:
    path = directory / "parts"
    path.mkdir()
    (path / "README.md").write_text("not data")
    cut = len(rows) // 2
    pq.write_table(pa.Table.from_pylist(list(rows[:cut])), path / "part-0.parquet", row_group_size=400)
    pq.write_table(pa.Table.from_pylist(list(rows[cut:])), path / "part-1.parquet")
    return path
