"""Sums over rows and decoded rows as explicit LLVM vectors: what the CPU kernels of the cosine are made of.

Letters: D width, R rows at a time, C directions at a time.

Why not plain loops: compilers vectorize them, but a core then waits for memory. Hardware prefetchers stop at the end of
every 4 KB page and take some lines to start again, a row of 4,096 float16 values being two pages. Here a loop reads R
rows side by side, one cache line of each per turn, and asks for the same columns of the R rows after them. Products
also load each direction once for R rows, which leaves the first cache to the rows.

The order of every sum is written down: `LANES` partial sums, added as a tree. Bits depend neither on the neighbours of
a row nor on the vector width of the machine (LLVM splits vectors that are wider than its registers).

Row formats by the type of a word: `float32` as it is, `uint16` the bits of a float16, `int16` the bits of a bfloat16,
`int8` an integer times the factor of its column; `bool` says that there are no words. No product is contracted with the
subtraction of two sides: equal sides differ by exactly 0.

Arrays are passed as addresses: Numba counts references to arrays for every group of rows, which took a tenth of the
time. Whoever calls a kernel keeps the arrays alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LINE_BYTES = 64

_FLOAT = ir.FloatType()
_BYTE = ir.IntType(8)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)


def _shaped(scalar: Any, lanes: int) -> Any:
    """LLVM type of `lanes` values."""
    return scalar if lanes == 1 else ir.VectorType(scalar, lanes)


def _filled(builder: Any, value: Any, lanes: int) -> Any:
    """One float32 in every lane."""
    if lanes == 1:
        return value
    vector = ir.VectorType(_FLOAT, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(
        first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)
    )


def _load(builder: Any, pointer: Any, lanes: int) -> Any:
    """`lanes` neighbouring words at any address."""
    return builder.load(builder.bitcast(pointer, _shaped(pointer.type.pointee, lanes).as_pointer()), align=1)


def _as_float(builder: Any, words: Any, word_type: Any, lanes: int) -> Any:
    """float32 values of loaded words."""
    single = _shaped(_FLOAT, lanes)
    if word_type == types.float32:
        return words
    if word_type == types.uint16:
        return builder.fpext(builder.bitcast(words, _shaped(ir.HalfType(), lanes)), single)
    if word_type == types.int16:
        integer = _shaped(_INT32, lanes)
        places = _INT32(16) if lanes == 1 else ir.Constant(integer, [16] * lanes)
        return builder.bitcast(builder.shl(builder.zext(words, integer), places), single)
    assert word_type == types.int8
    return builder.sitofp(words, single)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once where the machine can."""
    name = "f32" if a.type == _FLOAT else f"v{LANES}f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}"), [a, b, c])


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for a cache line, to be kept in the second cache; an address outside the array is ignored."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, second_cache, data = _INT32(0), _INT32(2), _INT32(1)
    builder.call(function, [builder.bitcast(pointer, _BYTE.as_pointer()), read, second_cache, data])


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = [
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_INT32, lanes), list(range(start, start + lanes)))
            )
            for start in (0, lanes)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, _INT32(0))


class _Side:
    """The rows, or the rows to subtract from them, inside generated code."""

    def __init__(self, builder: Any, kinds: Any, arguments: Any) -> None:
        _, address, starts, columns, factors = arguments
        self.word_type = kinds[0]
        self.size = self.word_type.bitwidth // 8
        word = _FLOAT if self.word_type == types.float32 else ir.IntType(self.word_type.bitwidth)
        first = builder.inttoptr(address, word.as_pointer())
        R = len(kinds[2])
        self.rows = [builder.gep(first, [builder.extract_value(starts, r)]) for r in range(R)]
        self.factors = [builder.extract_value(factors, r) for r in range(R)]
        self.columns = None if kinds[3] == types.none else builder.inttoptr(columns, _FLOAT.as_pointer())

    def column_factors(self, builder: Any, column: Any, lanes: int) -> Any:
        """Float32 factors of int8 columns, to be loaded once for all rows; None where there are none."""
        if self.word_type != types.int8 or self.columns is None:
            return None
        return _load(builder, builder.gep(self.columns, [column]), lanes)

    def values(self, builder: Any, r: int, column: Any, column_factors: Any, lanes: int) -> Any:
        """Float32 values of row r from `column` on."""
        words = _load(builder, builder.gep(self.rows[r], [column]), lanes)
        values = _as_float(builder, words, self.word_type, lanes)
        if column_factors is not None:
            values = builder.fmul(values, column_factors)
        return builder.fmul(values, _filled(builder, self.factors[r], lanes))


Step = Callable[[Any, int, bool], None]


def _for_all_columns(builder: Any, width: Any, size: int, step: Step) -> None:
    """Generate loops over the columns: by whole cache lines of words, then by vectors, then by single values.

    Args:
        builder: at the place of the loops; afterwards behind them.
        width: D, int64.
        size: bytes of a word.
        step: generates the work on `lanes` values from a column on; told whether a cache line starts there.
    """
    line = LINE_BYTES // size
    done = _INT64(0)
    for stride, lanes in dict.fromkeys([(line, LANES), (LANES, LANES), (1, 1)]):
        end = builder.mul(builder.udiv(width, _INT64(stride)), _INT64(stride))
        with cgutils.for_range_slice(builder, done, end, _INT64(stride), _INT64) as (column, _):
            for offset in range(0, stride, lanes):
                step(builder.add(column, _INT64(offset)), lanes, stride == line and offset == 0)
        done = end


def _sides(builder: Any, kinds: Any, arguments: Any) -> list[_Side]:
    """The rows and, where there is one, the side to subtract, from the ten arguments that describe them."""
    return [
        _Side(builder, kinds[first : first + 5], arguments[first : first + 5])
        for first in (0, 5)
        if kinds[first] != types.boolean
    ]


def _difference(builder: Any, sides: list[_Side], factors: list[Any], r: int, column: Any, lanes: int) -> Any:
    values = [side.values(builder, r, column, own, lanes) for side, own in zip(sides, factors, strict=True)]
    return values[0] if len(values) == 1 else builder.fsub(*values)


def _row_sums(
    typingctx: Any,
    word: Any,
    address: Any,
    starts: Any,
    columns: Any,
    factors: Any,
    minus_word: Any,
    minus_address: Any,
    minus_starts: Any,
    minus_columns: Any,
    minus_factors: Any,
    gain: Any,
    units: Any,
    unit_starts: Any,
    width: Any,
    ahead: Any,
    squared: Any,
) -> Any:
    """Sum of squares of R rows (or differences of rows), and their products with C directions, each word read once.

    A value is `(word * column factor * row factor - the same of the other side) * gain`. Factors that are the constant
    1 cost nothing: LLVM removes them.

    Args:
        typingctx: Numba's.
        word: any value of the row format's type.
        address: int64, where the words are.
        starts: R int64, the first word of each row.
        columns: int64, address of the float32 [D] factors of the columns; read where words are int8. None for none.
        factors: R float32, of the rows.
        minus_word: like `word`, of the side to subtract; False where there is none.
        minus_address: like `address`, for the other side.
        minus_starts: like `starts`, for the other side.
        minus_columns: like `columns`, for the other side.
        minus_factors: like `factors`, for the other side.
        gain: float32.
        units: int64, address of float32 directions.
        unit_starts: C int64 (none at all for C = 0), the first value of each direction.
        width: D, int64.
        ahead: two int64, how many words past the ones read to prefetch of each side, or None.
        squared: None to leave the sums of squares out, otherwise anything.

    Returns:
        R * (1 + C) float32: for each row its sum of squares, then its products; or R * C, the products.
    """
    R, C = len(starts), len(unit_starts)
    sides_arguments = (
        *(word, address, starts, columns, factors),
        *(minus_word, minus_address, minus_starts, minus_columns, minus_factors),
    )
    with_squares = squared != types.none
    result = types.UniTuple(types.float32, R * (with_squares + C))
    signature = result(*sides_arguments, gain, units, unit_starts, width, ahead, squared)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = _sides(builder, signature.args, args)
        gain, units, unit_starts, width, ahead_words, _ = args[10:]
        first_unit = builder.inttoptr(units, _FLOAT.as_pointer())
        directions = [builder.gep(first_unit, [builder.extract_value(unit_starts, c)]) for c in range(C)]
        sums = {
            lanes: [
                cgutils.alloca_once_value(builder, _filled(builder, _FLOAT(0.0), lanes)) for _ in range(len(result))
            ]
            for lanes in (LANES, 1)
        }

        def step(column: Any, lanes: int, new_line: bool) -> None:
            if new_line and ahead != types.none:
                for s, side in enumerate(sides):
                    distant = builder.add(column, builder.extract_value(ahead_words, s))
                    for row in side.rows:
                        _prefetch(builder, builder.gep(row, [distant]))
            column_factors = [side.column_factors(builder, column, lanes) for side in sides]
            weights = [_load(builder, builder.gep(direction, [column]), lanes) for direction in directions]
            for r in range(R):
                values = _difference(builder, sides, column_factors, r, column, lanes)
                values = builder.fmul(values, _filled(builder, gain, lanes))
                factors = [values, *weights] if with_squares else weights
                for c, weight in enumerate(factors):
                    total = sums[lanes][r * len(factors) + c]
                    builder.store(_multiply_add(builder, values, weight, builder.load(total)), total)

        _for_all_columns(builder, width, sides[0].size, step)
        totals = [
            builder.fadd(_sum_of_lanes(builder, builder.load(wide)), builder.load(single))
            for wide, single in zip(sums[LANES], sums[1], strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, totals)

    return signature, codegen


row_sums: Any = intrinsic(_row_sums)


def _store_row(
    typingctx: Any,
    word: Any,
    address: Any,
    starts: Any,
    columns: Any,
    factors: Any,
    minus_word: Any,
    minus_address: Any,
    minus_starts: Any,
    minus_columns: Any,
    minus_factors: Any,
    gain: Any,
    factor: Any,
    out: Any,
    out_start: Any,
    width: Any,
) -> Any:
    """Write the values of one row, as `row_sums` defines them, times `factor`.

    They go to the float32 values at the address `out`, from number `out_start` on.
    """
    sides_arguments = (
        *(word, address, starts, columns, factors),
        *(minus_word, minus_address, minus_starts, minus_columns, minus_factors),
    )
    signature = types.void(*sides_arguments, gain, factor, out, out_start, width)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sides = _sides(builder, signature.args, args)
        gain, factor, out, out_start, width = args[10:]
        first = builder.gep(builder.inttoptr(out, _FLOAT.as_pointer()), [out_start])

        def step(column: Any, lanes: int, new_line: bool) -> None:
            column_factors = [side.column_factors(builder, column, lanes) for side in sides]
            values = _difference(builder, sides, column_factors, 0, column, lanes)
            for number in (gain, factor):
                values = builder.fmul(values, _filled(builder, number, lanes))
            target = builder.bitcast(builder.gep(first, [column]), _shaped(_FLOAT, lanes).as_pointer())
            builder.store(values, target, align=4)

        _for_all_columns(builder, width, sides[0].size, step)
        return context.get_dummy_value()

    return signature, codegen


store_row: Any = intrinsic(_store_row)


def _read_float32(typingctx: Any, address: Any, i: Any) -> Any:
    """Value i of the float32 values at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.gep(builder.inttoptr(args[0], _FLOAT.as_pointer()), [args[1]]), align=4)

    return types.float32(address, i), codegen


read_float32: Any = intrinsic(_read_float32)
