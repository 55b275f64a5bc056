"""Finding the tables behind a path or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pairtrace.engine.arrow_tables import ArrowTable, ParquetTable, batch_records, saved_dataset
from pairtrace.engine.json_tables import JsonTable
from pairtrace.engine.tables import BATCH_ROWS, Record, Table, file_digest
from pairtrace.errors import ConfigError, DataError, DataFormatError, MissingDependencyError

_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz")
_SUFFIXES = (*_JSON_SUFFIXES, ".parquet", ".arrow")
_NOT_ROWS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KINDS = f"a file ({', '.join(_SUFFIXES)}), a directory of them, a saved data set, or a hub id"


def open_tables(data: str | Path, split: str | None) -> list[Table]:
    """Open the table or tables that hold the rows, in order.

    Args:
        data: file, directory of files, directory written by `datasets.save_to_disk`, or hub id.
        split: split to read where there are several.

    Raises:
        ConfigError: a split is given for a single file.
        DataError: there is nothing at `data`.
        DataFormatError: the files cannot be read.
        MissingDependencyError: a hub id without the package `datasets`.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _open_directory(path, split)
    if path.exists():
        if split is not None:
            raise ConfigError(f"{path} is a single file, which has no split {split!r}; leave --split out")
        return [_open_file(path)]
    name = str(data)
    identifier = name.removeprefix("hf://").removeprefix("datasets/")
    if _HUB_ID.fullmatch(identifier) and not identifier.endswith(_SUFFIXES):
        return [HubTable(identifier, split)]
    raise DataError(f"there is no file or directory {name!r}; expected {_KINDS}")


def _open_file(path: Path) -> Table:
    if path.name.endswith(_JSON_SUFFIXES):
        return JsonTable(path)
    if path.suffix == ".parquet":
        return ParquetTable(path)
    if path.suffix == ".arrow":
        return ArrowTable(str(path), [path])
    raise DataFormatError(f"{path}: the suffix {path.suffix!r} is not known; expected {_KINDS}")


def _open_directory(directory: Path, split: str | None) -> list[Table]:
    if (directory / "dataset_dict.json").is_file():
        try:
            splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataFormatError(f"{directory}: dataset_dict.json does not list the splits: {error}") from error
        return [saved_dataset(directory / _choose_split(str(directory), splits, split))]
    if (directory / "state.json").is_file():
        if split is not None:
            raise ConfigError(f"{directory} holds one data set, which has no split {split!r}; leave --split out")
        return [saved_dataset(directory)]
    files = sorted(
        file
        for file in directory.iterdir()
        if file.name.endswith(_SUFFIXES) and file.name not in _NOT_ROWS and not file.name.startswith(".")
    )
    if split is not None:
        files = [file for file in files if re.match(re.escape(split) + r"[-_.]", file.name)]
    if not files:
        wanted = f" for split {split!r}" if split is not None else ""
        raise DataFormatError(f"{directory} holds no data files{wanted}; expected {_KINDS}")
    kinds = sorted({"parquet" if file.suffix == ".parquet" else "JSON or Arrow" for file in files})
    if len(kinds) > 1:
        raise DataFormatError(f"{directory} holds {' and '.join(kinds)} files; give one file, or keep one kind there")
    return [_open_file(file) for file in files]


def _choose_split(name: str, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        found = "no split was chosen" if split is None else f"there is no split {split!r}"
        raise DataFormatError(f"{name}: {found}; choose with --split: {', '.join(splits)}")
    return split


class HubTable:
    """A data set of the Hugging Face hub, downloaded and cached by `datasets`.

    Raises:
        DataError: the data set cannot be loaded.
        DataFormatError: it has several splits and none is chosen.
        MissingDependencyError: `datasets` is not installed.
    """

    def __init__(self, identifier: str, split: str | None) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise MissingDependencyError("datasets", "train", f"reading {identifier!r} from the hub") from error
        try:
            loaded: Any = datasets.load_dataset(identifier)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{identifier!r} is neither a local file or directory nor a data set that the hub gave: {error}"
            ) from error
        self._dataset = loaded[_choose_split(identifier, list(loaded), split)]
        self.name = identifier
        self.columns = tuple(self._dataset.column_names)
        self.rows: int = len(self._dataset)
        self.block_starts: Sequence[int] = range(0, max(self.rows, 1), BATCH_ROWS)

    def digest(self) -> str:
        """SHA-256 of the cached Arrow files, in hex; of the rows where `datasets` holds them in memory."""
        files = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        if files:
            return file_digest(files)
        digest = hashlib.sha256()
        for record in self.read(0, self.rows, self.columns):
            digest.update(repr(record).encode("utf-8", "replace"))
        return digest.hexdigest()

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The rows from `start` up to `stop`, with the given columns."""
        view = self._dataset.select_columns(list(columns)).with_format("arrow")
        for first in range(start, min(stop, self.rows), BATCH_ROWS):
            yield from batch_records(view[first : min(first + BATCH_ROWS, stop, self.rows)])

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types, with the features of `datasets` in the metadata."""
        schema: pa.Schema = self._dataset.features.arrow_schema
        return schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows with all columns, in Arrow."""
        view = self._dataset.with_format("arrow")
        for first in range(0, self.rows, BATCH_ROWS):
            yield from view[first : first + BATCH_ROWS].to_batches()
