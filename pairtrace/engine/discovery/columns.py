"""Columns of plain values that items may be enriched in: the sources in a store, the metadata in its data, or any.

Letters: N rows of a store, n items, V values of a column.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pairtrace.engine.pairs import PairSource
from pairtrace.engine.scores_writer import arrow_strings
from pairtrace.errors import ConfigError, DataFormatError, DataMismatchError
from pairtrace.store.reader import ActivationStore

logger = logging.getLogger(__name__)

# A column with more distinct values holds texts, numbers or identifiers, which no cluster is made of.
MOST_VALUES = 1_000
_TOO_MANY = f"more than {MOST_VALUES} distinct values"
SOURCE = "source"


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A column of plain values, encoded.

    Attributes:
        name: of the column.
        codes: int32 [n], position in `values`.
        values: V distinct texts, ascending; "" stands for none.
    """

    name: str
    codes: np.ndarray
    values: tuple[str, ...]

    @classmethod
    def of(cls, name: str, values: Sequence[str]) -> Column:
        """Encode the texts of n items."""
        distinct, codes = np.unique(np.asarray(values, dtype=object), return_inverse=True)
        return cls(name=name, codes=codes.astype(np.int32), values=tuple(distinct.tolist()))

    def take(self, positions: np.ndarray) -> Column:
        """The column of some of the items."""
        return replace(self, codes=self.codes[positions])


def store_columns(
    store: ActivationStore, source: PairSource | None, wanted: Sequence[str] | None
) -> tuple[list[Column], dict[str, str]]:
    """Sources and metadata of all N rows of a store.

    Args:
        store: knows the sources.
        source: its data; None where that is not there.
        wanted: columns of the data; None for all that hold plain values, besides texts and sources.

    Returns:
        The columns; and those that were left out, with the reason.

    Raises:
        ConfigError: a wanted column is not there or does not hold plain values, or there is no data.
        DataFormatError: the data is damaged; or a column is wanted, and the data does not fit into one table.
        DataMismatchError: the data has fewer rows than when it was opened.
    """
    require_columns(source, wanted or ())
    offsets, data = store.source_strings()
    sources = _Encoder(SOURCE)
    sources.add(arrow_strings(pa.large_string(), offsets, data))
    columns, left_out = ([], {SOURCE: sources.problem}) if sources.problem else ([sources.column()], {})
    if source is None:
        return columns, left_out
    try:
        more, others = metadata_columns(source, store.rows, wanted)
    except DataFormatError as error:
        if wanted is not None:
            raise
        # The pairs could be read all the same: the columns beside them do not fit into one table.
        logger.warning("the clusters are described without metadata: %s", error)
        return columns, {**left_out, "metadata": str(error)}
    return columns + more, left_out | others


def require_columns(source: PairSource | None, wanted: Sequence[str]) -> None:
    """Find out before any work that columns are there.

    Args:
        source: the data; None where that is not there.
        wanted: names of columns.

    Raises:
        ConfigError: one is not there or does not hold plain values, or there is no data.
    """
    if not wanted:
        return
    if source is None:
        raise ConfigError(
            f"the columns {', '.join(wanted)} of the data are asked for, but the data is not there; say where with "
            "--data"
        )
    schema = source.schema()
    for name in wanted:
        if name not in schema.names:
            raise ConfigError(f"there is no column {name!r} in the data; there is: {', '.join(schema.names)}")
        if pa.types.is_nested(schema.field(name).type):
            raise ConfigError(f"the column {name!r} holds {schema.field(name).type}; expected a column of plain values")


def metadata_columns(
    source: PairSource, rows: int, wanted: Sequence[str] | None
) -> tuple[list[Column], dict[str, str]]:
    """The columns of plain values in preference data, besides texts and sources.

    Args:
        source: the data.
        rows: N, its first rows that count.
        wanted: names of columns; None for all.

    Returns:
        Columns of N values; and those that were left out, with the reason.

    Raises:
        ConfigError: a wanted column is not there, or does not hold plain values.
        DataFormatError: the data is damaged, or does not fit into one table.
        DataMismatchError: the data has fewer rows than when it was opened.
    """
    if wanted is not None and not wanted:
        return [], {}
    require_columns(source, wanted or ())
    schema = source.schema()
    texts = set(source.columns.values())
    names = [
        field.name
        for field in schema
        if (field.name in wanted if wanted is not None else field.name not in texts)
        and not pa.types.is_nested(field.type)
    ]
    encoders = {name: _Encoder(name) for name in names}
    read = 0
    if names:
        for batch in source.batches(pa.schema([schema.field(name) for name in names])):
            part = batch.slice(0, max(0, rows - read))
            read += part.num_rows
            for name, encoder in encoders.items():
                encoder.add(part.column(name))
            if not part.num_rows:
                break
        if read < rows:
            raise DataMismatchError(f"the data has {read} rows, but had {rows} when it was opened")
    return (
        [encoder.column() for encoder in encoders.values() if not encoder.problem],
        {name: encoder.problem for name, encoder in encoders.items() if encoder.problem},
    )


class _Encoder:
    """Takes the values of a column piece by piece, and gives up when there are too many different ones.

    Attributes:
        problem: why there is no column; "" as long as there is one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._numbers: dict[str, int] = {}
        self._pieces: list[np.ndarray] = []
        self.problem = ""

    def add(self, values: pa.Array) -> None:
        """Take the next values; None counts as ""."""
        if self.problem:
            return
        encoded = values.dictionary_encode()
        if len(encoded.dictionary) > MOST_VALUES:
            self.problem = _TOO_MANY
            return
        try:
            texts = [str(value) for value in encoded.dictionary.to_pylist()]
        except UnicodeDecodeError:
            self.problem = "a text that is not valid UTF-8"
            return
        if encoded.null_count:
            texts.append("")
        numbers = [self._numbers.setdefault(text, len(self._numbers)) for text in texts]
        places = encoded.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)
        self._pieces.append(np.array(numbers, np.int32)[places])
        if len(self._numbers) > MOST_VALUES:
            self.problem = _TOO_MANY

    def column(self) -> Column:
        """The whole column, where there was no problem."""
        assert not self.problem
        texts = np.array(list(self._numbers), dtype=object)
        order = np.argsort(texts)
        place = np.empty(len(texts), np.int32)
        place[order] = np.arange(len(texts), dtype=np.int32)
        codes = np.concatenate([np.empty(0, np.int32), *self._pieces])
        return Column(name=self._name, codes=place[codes], values=tuple(texts[order].tolist()))
