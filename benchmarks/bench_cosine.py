"""Cosine of rows in memory with 1 to 1,000 directions, against other libraries and against reading the bytes.

    python benchmarks/bench_cosine.py            # 378,341 x 4,096, float16 and int8; 12 GB of memory, ten minutes
    python benchmarks/bench_cosine.py --quick    # 8,192 x 256

The yardstick is the fastest of several ways to read the same bytes in the same number of threads, in the same rounds.
A competitor that would take longer than `--budget` seconds per run gets the first rows only; its rate is per row, and
the record says how many rows it had. FAISS searches normalized rows for the ten best per direction, and never has more
than 131,072 of them. The error is the largest difference of a score from its float64 value over a sample of rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from activations import DISTINCT_ROWS, PRODUCTION_ROWS, PRODUCTION_WIDTH, distinct_rows, repeated
from cosine_competitors import Competitor, FaissPieces, competitors
from harness import Claim, Timing, at_least, interleave, optional, parser, record, say, two_threads
from plain_read import read_memory

from pairtrace.kernels.int8 import ScaledRows, encode_int8

DIRECTIONS = (1, 8, 100, 1000)
REPEATS = {1: 7, 8: 5, 100: 3, 1000: 3}
SAMPLE_ROWS = 512
FAISS_PIECES = 16
# Our own runs are cut only where one would take this many seconds.
OWN_BUDGET = {"float16": 60.0, "int8": 15.0}
MATMUL_SHAPES = ((2048, 1000), (8192, 1000))


@dataclass(kw_only=True)
class Run:
    """One competitor with its number of rows and its K.

    Attributes:
        name, family, dtype, note: as for `Competitor`; the fastest of a family and dtype counts.
        rows, row_bytes: what one call reads.
        flops: of one call, products and sums of dot products only.
        call: the work.
        error: largest difference from float64, where it can be told.
        timing: of `call`, once it is measured.
    """

    name: str
    family: str
    dtype: str
    call: Callable[[], object]
    rows: int = 1
    row_bytes: int = 0
    flops: float = 0.0
    error: float | None = None
    note: str = ""
    timing: Timing = field(default_factory=lambda: Timing.of([float("inf")]))

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.timing.median

    def over(self, other: Run) -> float:
        """Its bytes per second as a multiple of the other's."""
        scale = self.rows * self.row_bytes / (other.rows * other.row_bytes)
        return other.timing.over(self.timing) * scale

    def figures(self, yardstick: Run) -> dict[str, Any]:
        found: dict[str, Any] = {
            "family": self.family,
            "dtype": self.dtype,
            "rows": self.rows,
            "seconds": self.timing.median,
            "runs": self.timing.runs,
            "gflops": self.flops / self.timing.median / 1e9,
            "note": self.note,
        }
        if self.row_bytes:
            found |= {
                "rows_per_second": self.rate,
                "slowest": self.rows / self.timing.highest,
                "fastest": self.rows / self.timing.lowest,
                "gb_per_second": self.rate * self.row_bytes / 1e9,
                "of_plain_read": self.over(yardstick),
            }
        return found if self.error is None else {**found, "largest_error": self.error}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows in both types, a sample of them, and FAISS's indexes by dtype."""

    float16: np.ndarray
    int8: ScaledRows
    sample: slice
    indexes: dict[str, list[FaissPieces]]

    def rows(self, dtype: str) -> Any:
        return self.int8 if dtype == "int8" else self.float16


def rows_within(budget: float, call: Callable[[int], object], total: int, least: int) -> int:
    """How many rows a run may have; the two trial runs also warm up."""
    trial = min(least, total)
    call(trial)
    begun = time.perf_counter()
    call(trial)
    return min(total, max(least, int(trial * budget / (time.perf_counter() - begun))))


def drain(blocks: Iterable[object]) -> None:
    for _ in blocks:
        pass


def exact_scores(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """The definition in float64, [n, K]."""
    wide, units = rows.astype(np.float64), directions.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    scores: np.ndarray = (wide @ units.T) / np.linalg.norm(wide, axis=1, keepdims=True)
    return scores


def competitor_run(one: Competitor, data: Data, directions: np.ndarray, budget: float) -> Run:
    rows = data.rows(one.dtype)
    budget = max(budget, OWN_BUDGET[one.dtype]) if one.family == "pairtrace" else budget
    count = rows_within(budget, lambda count: drain(one.blocks(rows[:count], directions)), len(rows), 4096)
    error = None
    if one.exact:
        sample = rows[data.sample]
        wanted = exact_scores(sample.decode() if isinstance(sample, ScaledRows) else sample, directions)
        # A block may be used again for the next one.
        found = np.concatenate([block.copy() for block in one.blocks(sample, directions)])
        error = float(np.abs(found - wanted).max())
    return Run(
        name=one.name, family=one.family, dtype=one.dtype, note=one.note, rows=count, error=error,
        row_bytes=row_bytes(rows), flops=2.0 * count * directions.size,
        call=lambda: drain(one.blocks(rows[:count], directions)),
    )  # fmt: skip


def row_bytes(rows: np.ndarray | ScaledRows) -> int:
    """Bytes of one row; the scale of an int8 row counts."""
    count, width = rows.shape
    return width + 4 if isinstance(rows, ScaledRows) else rows.nbytes // count


def faiss_run(index: FaissPieces, data: Data, dtype: str, directions: np.ndarray, budget: float) -> Run:
    """The faster of FAISS's own threads and pieces on ours."""
    least = 2 * index.piece_rows
    ways = {across: partial(index.search, directions, across=across) for across in (True, False)}
    counts = {across: rows_within(budget, search, index.rows, least) for across, search in ways.items()}
    across = counts[True] >= counts[False]
    count = counts[across] // index.piece_rows * index.piece_rows
    scores, numbers = index.search(directions, index.piece_rows, across=across)
    wanted = exact_scores(data.float16[np.unique(numbers)], directions)
    places = np.searchsorted(np.unique(numbers), numbers)
    error = np.abs(scores - wanted[places, np.arange(len(directions))[:, None]]).max()
    return Run(
        name=index.name, family="FAISS", dtype=dtype, rows=count, error=float(error),
        note=f"ten best per direction, {'pieces on threads of our own' if across else 'its own threads'}",
        row_bytes=row_bytes(data.rows(dtype)), flops=2.0 * count * directions.size,
        call=lambda: index.search(directions, count, across=across),
    )  # fmt: skip


def read_runs(data: Data, dtype: str, threads: int) -> list[Run]:
    rows = data.rows(dtype)
    values = rows.values if isinstance(rows, ScaledRows) else rows
    common: dict[str, Any] = {"family": "plain read", "dtype": dtype, "rows": len(values)}
    size = values.nbytes // len(values)
    return [
        Run(name=f"{name}, {dtype}", row_bytes=size, call=call, **common)
        for name, call in read_memory(values, threads).items()
    ]


def matmul_runs(width: int, quick: bool) -> list[Run]:
    """Float32 matrix products by PyTorch and NumPy."""
    runs = []
    for height, columns in MATMUL_SHAPES[: 1 if quick else None]:
        left = np.random.default_rng(0).standard_normal((height, width), dtype=np.float32)
        right = np.ascontiguousarray(left[:columns].T)
        tensors = torch.from_numpy(left), torch.from_numpy(right)
        shape, flops = f"{height} x {width} x {columns}", 2.0 * height * width * columns
        calls: dict[str, Callable[[], object]] = {
            "torch.mm": lambda tensors=tensors: torch.mm(*tensors),  # type: ignore[misc]
            "NumPy": lambda left=left, right=right: left @ right,  # type: ignore[misc]
        }
        runs += [
            Run(name=f"{name} {shape}", family="float32 matmul", dtype="float32", flops=flops, call=call)
            for name, call in calls.items()
        ]
    return runs


def measure(ways: list[Competitor], data: Data, directions: np.ndarray, options: argparse.Namespace) -> list[Run]:
    """Everything with one K, in turn."""
    count = len(directions)
    say(f"K = {count}: trial runs")
    runs = [competitor_run(one, data, directions, options.budget) for one in ways if one.most_directions >= count]
    runs += [
        faiss_run(index, data, dtype, directions, options.budget)
        for dtype, indexes in data.indexes.items()
        for index in indexes
        if index.most_directions >= count
    ]
    yardsticks = [run for dtype in ("float16", "int8") for run in read_runs(data, dtype, options.threads)]
    if options.quick or count == max(DIRECTIONS):
        yardsticks += matmul_runs(data.float16.shape[1], options.quick)
    for run in yardsticks:
        run.call()
    runs = yardsticks + runs
    repeats = 1 if options.quick else REPEATS[count]
    calls = {run.name: run.call for run in runs}
    timings = interleave(calls, repeats, warm_up=0, before=lambda _: time.sleep(0.05))
    for run in runs:
        run.timing = timings[run.name]
    return runs


def fastest(runs: list[Run], family: str, dtype: str = "float16") -> Run | None:
    mine = [run for run in runs if (run.family, run.dtype) == (family, dtype)]
    if family == "float32 matmul":
        return max(mine, key=lambda run: run.flops / run.timing.median, default=None)
    return max(mine, key=lambda run: run.rate, default=None)


def claims_of(runs: dict[int, list[Run]]) -> list[Claim]:
    one, most = runs[1], max(runs)
    ours, plain, int8 = fastest(one, "pairtrace"), fastest(one, "plain read"), fastest(one, "pairtrace", "int8")
    many, product = fastest(runs[most], "pairtrace"), fastest(runs[most], "float32 matmul", "float32")
    assert ours and plain and int8 and many and product
    of_product = product.timing.over(many.timing) * many.flops / product.flops
    claims = [
        at_least("K = 1, float16: bytes/s of the plain read's", ours.over(plain), 0.92),
        at_least("K = 1, int8: rows/s over float16's", ours.timing.over(int8.timing) * int8.rows / ours.rows, 1.7),
        at_least(f"K = {most}, float16: FLOP/s of the float32 matmul's", of_product, 0.7),
    ]
    for family, target in (("NumKong", 1.5), ("FAISS", 2.5)):
        other = fastest(one, family)
        if other is not None:
            claims.append(at_least(f"K = 1, float16: rows/s over {family}'s", ours.over(other), target))
    return claims


def main(arguments: list[str] | None = None) -> None:
    add = parser(__doc__ or "")
    add.add_argument("--rows", type=int, default=None, help=f"[default: {PRODUCTION_ROWS}]")
    add.add_argument("--threads", type=int, default=two_threads(), help="of every competitor")
    add.add_argument("--budget", type=float, default=1.0, help="seconds that one run of a competitor may take")
    options = add.parse_args(arguments)
    options.budget = min(options.budget, 0.05) if options.quick else options.budget
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    width, count = (256, 8_192) if options.quick else (PRODUCTION_WIDTH, PRODUCTION_ROWS)
    count = options.rows or count
    say("making the rows")
    distinct = distinct_rows(width, min(DISTINCT_ROWS, count))
    scaled = encode_int8(distinct)
    faiss, pieces = optional("faiss"), max(1, min(FAISS_PIECES, count // len(distinct)))
    kinds = {"float16": ("flat", "QT_fp16"), "int8": ("QT_8bit",)} if faiss else {}
    data = Data(
        float16=repeated(distinct, count),
        int8=ScaledRows(repeated(scaled.values, count), repeated(scaled.row_scale, count), scaled.column_scale),
        sample=slice(0, min(SAMPLE_ROWS, count)),
        indexes={
            dtype: [FaissPieces(faiss, kind, distinct, pieces, options.threads) for kind in names]
            for dtype, names in kinds.items()
        },
    )
    directions = np.random.default_rng(1).standard_normal((max(DIRECTIONS), width), dtype=np.float32)
    norms = np.linalg.norm(distinct.astype(np.float64), axis=1).astype(np.float32)
    ways = competitors(options.threads, repeated(norms, count))
    counts = DIRECTIONS[:3] if options.quick else DIRECTIONS
    runs = {many: measure(ways, data, directions[:many], options) for many in counts}
    results: dict[str, Any] = {}
    for many, measured in runs.items():
        plain = {dtype: fastest(measured, "plain read", dtype) for dtype in ("float16", "int8", "float32")}
        results[str(many)] = {run.name: run.figures(plain[run.dtype] or run) for run in measured}
    exact, rounded = (
        exact_scores(rows, directions) for rows in (data.float16[data.sample], data.int8[data.sample].decode())
    )
    workload = {
        "rows": count,
        "width": width,
        "distinct_rows": len(distinct),
        "threads": options.threads,
        "budget_seconds": options.budget,
        "error": f"over {len(exact)} rows; int8 against its own decoded rows; FAISS over the rows it gives",
        "int8_rounding": float(np.abs(rounded - exact).max()),
    }
    record("bench_cosine", options, workload=workload, results=results, claims=claims_of(runs))


if __name__ == "__main__":
    main()
