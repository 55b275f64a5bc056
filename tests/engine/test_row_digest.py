"""The digest of rows: blind to batches and to what Arrow leaves open, awake to everything else."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pairtrace.engine.row_digest import RowDigest

COLUMNS: dict[str, pa.Array[Any]] = {
    "text": pa.array(["a", None, "", "bc", "déf"]),
    "large": pa.array(["a", None, "", "bc", "d"], pa.large_string()),
    "bytes": pa.array([b"\xff", b"", None, b"x", b"yz"]),
    "fixed": pa.array([b"ab", None, b"cd", b"ef", b"gh"], pa.binary(2)),
    "number": pa.array([1, None, 3, -4, 5]),
    "float": pa.array([0.5, None, float("nan"), -0.0, 1e300]),
    "flag": pa.array([True, None, False, True, False]),
    "nothing": pa.nulls(5),
    "when": pa.array([datetime.datetime(2026, 1, day) for day in range(1, 6)], pa.timestamp("s")),
    "money": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3.00"), None, decimal.Decimal("0.00")]),
    "kind": pa.array(["x", "y", None, "x", "y"]).dictionary_encode(),
    "messages": pa.array(
        [[{"role": "user", "content": "hi"}], None, [], [{"role": "a", "content": None}, None], [{"role": "b"}]]
    ),
    "pair": pa.array([{"a": [1], "b": "x"}, None, {"a": None, "b": None}, {"a": [], "b": ""}, {"a": [2, 3]}]),
    "vector": pa.array([[1, 2], None, [3, None], [5, 6], [7, 8]], pa.list_(pa.int32(), 2)),
    "map": pa.array([[("k", 1)], None, [], [("a", None)], [("b", 2), ("c", 3)]], pa.map_(pa.string(), pa.int64())),
}


def digest(table: pa.Table, *, size: int | None = None) -> str:
    whole = RowDigest(table.schema)
    for batch in table.to_batches(max_chunksize=size):
        whole.update(batch)
    return whole.hexdigest()


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_batches_leave_no_trace_and_every_value_counts(name: str) -> None:
    table = pa.table({name: COLUMNS[name]})
    expected = digest(table)
    assert {digest(table, size=size) for size in (1, 2, 3)} == {expected}
    # Sliced out of longer arrays, with offsets.
    longer = pa.concat_tables([table, table, table]).combine_chunks()
    assert digest(longer.slice(5, 5)) == expected
    assert digest(longer) != expected and digest(table.slice(1)) != expected
    if name != "nothing":
        orders = [table.take(order) for order in ([1, 0, 2, 3, 4], [0, 1, 2, 4, 3], [2, 1, 0, 3, 4])]
        assert len({expected, *map(digest, orders)}) == 4
        assert digest(pa.table({name: pa.nulls(5, COLUMNS[name].type)})) != expected


def test_types_names_and_metadata_count() -> None:
    column = pa.array(["a", "b"])
    tables = [
        pa.table({"x": column}),
        pa.table({"y": column}),
        pa.table({"x": column.cast(pa.large_string())}),
        pa.table({"x": column.cast(pa.binary())}),
        pa.table({"x": column}).replace_schema_metadata({"k": "v"}),
        pa.table({"x": column, "z": column}),
    ]
    assert len({digest(table) for table in tables}) == len(tables)


def test_values_do_not_run_into_each_other() -> None:
    pairs: list[tuple[list[Any], list[Any]]] = [
        (["ab", "c"], ["a", "bc"]),
        (["", None], [None, ""]),
        ([["a"], ["b"]], [["a", "b"], []]),
        ([[], None], [None, []]),
        ([{"a": None}, {"a": 1}], [None, {"a": 1}]),
    ]
    for one, other in pairs:
        assert digest(pa.table({"x": one})) != digest(pa.table({"x": other})), (one, other)
    # A value cannot move from one column to its neighbour.
    assert digest(pa.table({"x": ["a"], "y": [""]})) != digest(pa.table({"x": [""], "y": ["a"]}))


def test_bytes_under_a_null_do_not_count() -> None:
    valid = pa.array([True, False, True])
    hidden = [
        pa.Array.from_buffers(pa.int64(), 3, [_bits(valid), pa.py_buffer(np.array(values, np.int64).tobytes())])
        for values in ([1, 2, 3], [1, 9, 3])
    ]
    assert hidden[0].equals(hidden[1])
    assert len({digest(pa.table({"x": array})) for array in hidden}) == 1


def _bits(valid: pa.Array[Any]) -> pa.Buffer:
    packed = valid.buffers()[1]
    assert packed is not None
    return packed
