"""Whole rows of preference data as Arrow batches, every column and its type kept.

What has a schema (parquet, Arrow, the hub) passes through untouched; for JSON one is inferred from all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pairtrace.engine.arrow_tables import ArrowTable, ParquetTable
from pairtrace.engine.inputs import HubTable
from pairtrace.engine.tables import BATCH_ROWS, Table, Unreadable
from pairtrace.errors import DataFormatError


def common_schema(tables: Sequence[Table]) -> pa.Schema:
    """The schema that holds the rows of all tables, with the metadata of the first (such as features of `datasets`).

    Raises:
        DataFormatError: columns of one name have types that do not go together; names the file and the rows.
    """
    schema: pa.Schema | None = None
    for table in tables:
        for where, part in _schemas(table):
            if schema is None:
                schema = part
                continue
            try:
                schema = pa.unify_schemas([schema, part], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
                raise DataFormatError(
                    f"{where}: a column has another type than in the rows before, so the rows do not fit into one "
                    f"table: {error}"
                ) from error
    assert schema is not None, "there is at least one table"
    complete = pa.schema([_without_null_type(field) for field in schema])
    return complete.with_metadata(schema.metadata) if schema.metadata else complete


def read_batches(tables: Sequence[Table], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All rows of all tables in order, brought to one schema, at most `BATCH_ROWS` or an Arrow file's batch at a time.

    Raises:
        DataFormatError: a file is damaged, or changed since it was opened.
    """
    for table in tables:
        for batch in _batches(table, schema):
            yield _conformed(batch, schema)


def _schemas(table: Table) -> Iterator[tuple[str, pa.Schema]]:
    if isinstance(table, ParquetTable | ArrowTable | HubTable):
        yield table.name, table.schema
    else:
        for start, records in _json_records(table):
            where = f"{table.name}, rows {start} to {start + len(records) - 1}"
            yield where, _from_records(records, None, where).schema


def _batches(table: Table, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if isinstance(table, ParquetTable | ArrowTable | HubTable):
        yield from table.batches()
        return
    for start, records in _json_records(table):
        where = f"{table.name}, rows {start} to {start + len(records) - 1}"
        yield _from_records(records, schema, where)


def _json_records(table: Table) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Blocks of records with the number of their first row."""
    held: list[dict[str, Any]] = []
    start = 0
    for record in table.read(0, table.rows, table.columns):
        assert not isinstance(record, Unreadable), "what is not readable JSON was refused when the file was opened"
        held.append(record)
        if len(held) == BATCH_ROWS:
            yield start, held
            start, held = start + len(held), []
    if held:
        yield start, held


def _from_records(records: list[dict[str, Any]], schema: pa.Schema | None, where: str) -> pa.RecordBatch:
    names = schema.names if schema is not None else list(dict.fromkeys(name for record in records for name in record))
    columns = []
    for name in names:
        kind = schema.field(name).type if schema is not None else None
        try:
            columns.append(pa.array([record.get(name) for record in records], kind))
        except (pa.ArrowTypeError, pa.ArrowInvalid, UnicodeEncodeError, OverflowError) as error:
            raise DataFormatError(f"{where}: column {name!r} cannot be kept as one type: {error}") from error
    return pa.RecordBatch.from_arrays(columns, names=names)


def _without_null_type(field: pa.Field) -> pa.Field:
    """A column without a single value gets a type that every reader has."""
    return field.with_type(pa.string()) if pa.types.is_null(field.type) else field


def _conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if batch.schema.equals(schema):
        return batch.replace_schema_metadata(schema.metadata)
    columns = []
    for field in schema:
        position = batch.schema.get_field_index(field.name)
        if position < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
        else:
            column = batch.column(position)
            columns.append(column if column.type == field.type else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)
