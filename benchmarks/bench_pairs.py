"""Reading a million preference pairs: rows per second and peak memory, per file format.

    python benchmarks/bench_pairs.py            # 1,000,000 rows; a few minutes, 2 GB of temporary files
    python benchmarks/bench_pairs.py --quick    # 20,000 rows

Every format is opened (recognised, hashed, counted) and read to the end by a fresh process, whose peak resident
memory is the figure; an empty process with the same imports is the baseline.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from harness import Claim, parser, record

READER = """
import json, sys, time
from pathlib import Path
from pairtrace.engine.pairs import open_pairs
begun = time.process_time()
rows = 0
if len(sys.argv) > 1:
    source = open_pairs(sys.argv[1])
    opened = time.process_time()
    for pair in source.read():
        assert not pair.problem
        rows += 1
    assert rows == source.rows
else:
    opened = begun
# Not getrusage: a child begins with its parent's maximum there.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"rows": rows, "open_seconds": opened - begun, "read_seconds": time.process_time() - opened,
                  "peak_mib": int(peak.split()[1]) / 1024}))
"""


def rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {
            "prompt": [{"role": "user", "content": f"Question number {number}: {'please explain ' * 6}"}],
            "chosen": [{"role": "assistant", "content": f"Answer {number}. {'Here is how it works. ' * 8}"}],
            "rejected": [{"role": "assistant", "content": f"No, not {number}. {'That is not for me. ' * 8}"}],
            "source": f"part-{number % 7}",
        }


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows(count):
            stream.write(json.dumps(row) + "\n")


def write_jsonl_gz(path: Path, count: int) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as stream:
        for row in rows(count):
            stream.write(json.dumps(row) + "\n")


def write_json(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows(count)):
            stream.write(("[" if number == 0 else ",\n") + json.dumps(row))
        stream.write("]")


def write_parquet(path: Path, count: int) -> None:
    batch: list[dict[str, Any]] = []
    writer = None
    for row in rows(count):
        batch.append(row)
        if len(batch) == 50_000:
            table = pa.Table.from_pylist(batch)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            batch = []
    if batch:
        table = pa.Table.from_pylist(batch)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "jsonl.gz": write_jsonl_gz,
    "json": write_json,
}


def measure(path: Path | None) -> dict[str, float]:
    command = [sys.executable, "-c", READER, *([str(path)] if path else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    return figures


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    count, repeats = (20_000, 1) if options.quick else (1_000_000, 3)
    results: dict[str, Any] = {"imports alone": {"peak_mib": measure(None)["peak_mib"]}}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"pairs.{name}" for name in WRITERS}
        for name, path in paths.items():
            WRITERS[name](path, count)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
        for _ in range(repeats):
            for name, path in paths.items():
                runs[name].append(measure(path))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
        for name, path in paths.items():
            results[name] = {
                "file_mib": path.stat().st_size / 2**20,
                "open_seconds": statistics.median(run["open_seconds"] for run in runs[name]),
                "rows_per_second": statistics.median(run["rows"] / run["read_seconds"] for run in runs[name]),
                "slowest": min(run["rows"] / run["read_seconds"] for run in runs[name]),
                "fastest": max(run["rows"] / run["read_seconds"] for run in runs[name]),
                "peak_mib": max(run["peak_mib"] for run in runs[name]),
            }
    worst = max(row["peak_mib"] for row in results.values())
    claims = [Claim(name="peak memory of any format, MiB", value=worst, target=1024.0, holds=worst <= 1024)]
    record("bench_pairs", options, workload={"rows": count, "repeats": repeats}, results=results, claims=claims)


if __name__ == "__main__":
    main()
