"""The data behind a scores file: opened the way the store read it, and checked to be the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairtrace.engine.inputs import open_tables
from pairtrace.engine.pairs import PairSource, open_pairs
from pairtrace.engine.scores_table import ScoresTable
from pairtrace.errors import DataError, DataFormatError, DataMismatchError, MissingDependencyError

_DATA_ENTRIES: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "data_format": (str,),
    "data_fingerprint": (str,),
    "columns": (dict,),
    "rows": (int,),
    "limit": (int, type(None)),
}


def open_scored_data(table: ScoresTable, data: str | Path | None, split: str | None) -> PairSource:
    """Open the data that a scores file ranks.

    Args:
        table: the scores file.
        data: where the data is; None for the path that the store recorded.
        split: of a data set that has several.

    Raises:
        DataError: there is no data where the store recorded it.
        DataFormatError: the scores file does not say what it ranks, or the data cannot be read.
        DataMismatchError: the data is not what the store was made from.
    """
    return open_recorded(_store_manifest(table), data, split, owner=table.path)


def open_recorded(
    made_from: Mapping[str, Any], data: str | Path | None, split: str | None, *, owner: str
) -> PairSource:
    """Open the data that a store was made from, the way it was read then.

    Args:
        made_from: the store's manifest.
        data: where the data is; None for the path that the store recorded.
        split: of a data set that has several.
        owner: the file that stands for the store in messages.

    Raises:
        DataError: there is no data where the store recorded it.
        DataFormatError: the data cannot be read.
        DataMismatchError: the data is not what the store was made from.
    """
    columns = made_from["columns"]
    place = made_from["data"] if data is None else data
    try:
        source = open_pairs(
            place,
            format=made_from["data_format"],
            prompt=columns.get("prompt"),
            chosen=columns.get("chosen"),
            rejected=columns.get("rejected"),
            source=columns.get("source"),
            split=split,
            limit=made_from["limit"],
        )
    except (DataError, MissingDependencyError) as error:
        if data is not None:
            if isinstance(error, DataFormatError):
                _explain_other_columns(made_from, data, split, owner, error)
            raise
        raise DataError(
            f"the data cannot be opened where the store recorded it, {place!r}: {error}; say where it is with --data"
        ) from error
    for what, expected, actual in (
        ("fingerprint", made_from["data_fingerprint"], source.fingerprint),
        ("number of rows", made_from["rows"], source.rows),
    ):
        if expected != actual:
            raise DataMismatchError(
                f"{place} is not the data behind {owner}: its {what} is {actual}, expected {expected} (the store was "
                f"made from {made_from['data']}); its rows would be the wrong ones"
            )
    return source


def _explain_other_columns(
    made_from: Mapping[str, Any], data: str | Path, split: str | None, owner: str, error: DataFormatError
) -> None:
    """Say that it is other data where columns are missing whose names nobody has given.

    Raises:
        DataFormatError: the data cannot be read at all.
        DataMismatchError: it lacks columns that the store was made from.
    """
    found = [column for table in open_tables(data, split) for column in table.columns]
    needed = {role: column for role, column in made_from["columns"].items() if column is not None}
    if not set(needed.values()) <= set(found):
        expected = ", ".join(f"{role} in {column!r}" for role, column in needed.items())
        raise DataMismatchError(
            f"{data} is not the data behind {owner}: expected is {made_from['data_format']} ({expected}), made from "
            f"{made_from['data']}; its columns are {', '.join(dict.fromkeys(found)) or 'none'}"
        ) from error


def _store_manifest(table: ScoresTable) -> dict[str, Any]:
    """What the scores file keeps of its store's manifest, with the entries that opening the data needs."""
    made_from = table.manifest.get("store_manifest")
    for name, kinds in _DATA_ENTRIES.items():
        if not isinstance(made_from, dict) or name not in made_from or not isinstance(made_from[name], kinds):
            raise DataFormatError(
                f"{table.path} does not say which data it ranks: its manifest has no valid store_manifest.{name}; "
                "make it again with pairtrace score"
            )
    assert isinstance(made_from, dict)
    return made_from
