"""The whole command `pairtrace score` on a store of production size, against a plain read of the same files.

    python benchmarks/bench_score_store.py            # up to 1,000,000 x 4,096; 9 GB of disk, under ten minutes
    python benchmarks/bench_score_store.py --quick    # up to 6,144 x 256

The command runs in a process of its own. Its start-up (interpreter, imports, compiled code from the cache) is the same
command on a store of one shard, run in the same rounds, and is taken off and shown; for the time per row, which for
the smallest store is much shorter than the start-up, only the time after the imports is counted. The plain read is
`readinto` one buffer of a megabyte, one thread, file after file. Cold means that the files' pages were dropped from the
page cache, which is checked. Memory is the anonymous resident part (RssAnon), sampled every 20 ms; mapped files are
page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from activations import (
    DISTINCT_ROWS,
    PRODUCTION_ROWS,
    PRODUCTION_WIDTH,
    SHARD_ROWS,
    distinct_rows,
    first_rows,
    make_manifest,
    write_store,
)
from harness import Claim, Timing, at_least, at_most, interleave, parser, record, say, workspace
from plain_read import drop_from_cache, files_below, read_files, read_files_in_threads, resident_share

CURVE = (100_000, PRODUCTION_ROWS, 1_000_000)
QUICK_CURVE = (700, 2_500, 6_144)
SAMPLE_SECONDS = 0.02


class Command:
    """`pairtrace score` on one store, with what its runs told."""

    def __init__(self, store: Path, direction: Path, rows: int) -> None:
        self.store, self.rows = store, rows
        self.files = files_below(store)
        self.bytes = sum(path.stat().st_size for path in self.files)
        self.inside: list[float] = []
        self.peak_mib: list[float] = []
        out = store.with_suffix(".parquet")
        self._words = ["--quiet", "score", str(store), str(direction), "--out", str(out), "--json"]

    def run(self) -> None:
        command = [sys.executable, "-m", "pairtrace.cli", *self._words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            watch = threading.Thread(target=self._watch, args=(child,))
            watch.start()
            output, notes = child.communicate()
            watch.join()
        # A note would be about something else than the usual way, for example the slow reference kernel.
        if child.returncode or notes:
            sys.exit(f"{' '.join(command)} ended with {child.returncode}: {notes}")
        summary = json.loads(output)
        assert summary["scored"] == self.rows, summary
        self.inside.append(summary["seconds"])

    def _watch(self, child: subprocess.Popen[str]) -> None:
        """Largest RssAnon of the process, MiB."""
        peak = 0
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
            except (FileNotFoundError, ProcessLookupError):
                break
            found = [line for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max(peak, *(int(line.split()[1]) for line in found), 0)
            time.sleep(SAMPLE_SECONDS)
        self.peak_mib.append(peak / 1024)


def build(folder: Path, sizes: tuple[int, ...], width: int, shard_rows: int) -> dict[int, Path]:
    """Stores of several sizes; the smaller ones share the largest one's files."""
    rows = distinct_rows(width, DISTINCT_ROWS // SHARD_ROWS * shard_rows)
    stores = {size: folder / f"{size}.zarr" for size in sizes}
    largest = max(sizes)
    for size in sorted(sizes, reverse=True):
        manifest = make_manifest(size, width, shard_rows=shard_rows)
        say(f"store of {size:,} rows")
        if size == largest:
            begun = time.perf_counter()
            write_store(stores[size], manifest, rows, fsync=False)
            say(f"  written in {time.perf_counter() - begun:.0f} s")
        else:
            first_rows(stores[size], stores[largest], manifest, rows)
    return stores


def timings_of(seconds: Timing, size: int) -> dict[str, Any]:
    return {**asdict(seconds), "gb_per_second": size / seconds.median / 1e9}


def warm(commands: dict[int, Command], middle: int, repeats: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the page cache: the curve over the sizes, and the plain reads of the middle one."""
    tiny = commands[min(commands)]
    files, size = commands[middle].files, commands[middle].bytes
    for command in commands.values():
        read_files(command.files)
    runs: dict[str, Callable[[], object]] = {
        "plain read": lambda: read_files(files),
        f"plain read, {options.threads} threads": lambda: read_files_in_threads(files, options.threads),
        **{f"score {rows:,} rows": command.run for rows, command in commands.items()},
    }
    seconds = interleave(runs, repeats, warm_up=0 if options.quick else 1)
    inside = {rows: Timing.of(command.inside[-repeats:]) for rows, command in commands.items()}
    start_up = seconds[f"score {tiny.rows:,} rows"]
    results: dict[str, Any] = {name: timings_of(seconds[name], size) for name in list(runs)[:2]}
    results["start-up"] = asdict(start_up)
    for rows, command in commands.items():
        if command is tiny:
            continue
        total = seconds[f"score {rows:,} rows"]
        net = total.less(start_up)
        after_imports = inside[rows].less(inside[tiny.rows])
        results[f"score {rows:,} rows"] = {
            **timings_of(net, command.bytes),
            "rows": rows,
            "process_seconds": total.median,
            "after_imports": asdict(after_imports),
            "seconds_per_million_rows": after_imports.median / rows * 1e6,
            "of_plain_read": net.over(seconds["plain read"]),
            "peak_anonymous_mib": max(command.peak_mib),
        }
    return results


def cold(command: Command, tiny: Command, repeats: int) -> dict[str, Any]:
    """From the disk: the command and the plain read in turn, each after its pages were dropped."""
    left = drop_from_cache(command.files)
    if left > 0.01:
        say(f"{left:.0%} of the pages stay in the page cache: the cold runs are left out")
        return {"pages_left": left}
    shares = [left]

    def drop(name: str) -> None:
        if name != "start-up":
            shares.append(drop_from_cache(command.files))

    runs = {"plain read": lambda: read_files(command.files), "start-up": tiny.run, "score": command.run}
    found = interleave(runs, repeats, warm_up=0, before=drop)
    net = found["score"].less(found["start-up"])
    return {
        "pages_left": max(shares),
        "pages_after_score": resident_share(command.files),
        "plain read": timings_of(found["plain read"], command.bytes),
        "score": {**timings_of(net, command.bytes), "of_plain_read": found["plain read"].over(net)},
    }


def claims_of(results: dict[str, Any], sizes: tuple[int, ...]) -> list[Claim]:
    smallest, middle, largest = (results["warm"][f"score {rows:,} rows"] for rows in sizes)
    growth = largest["seconds_per_million_rows"] / smallest["seconds_per_million_rows"]
    claims = [
        at_most("warm: seconds over those of a plain read of the same files", middle["of_plain_read"], 1.3),
        at_most(f"peak anonymous memory at {sizes[2]:,} rows, MiB", largest["peak_anonymous_mib"], 700),
        at_most(f"seconds per row at {sizes[2]:,} rows over those at {sizes[0]:,}", growth, 1.15),
    ]
    if "score" in results["cold"]:
        name = "cold: bytes/s over those of a sequential read"
        claims.append(at_least(name, results["cold"]["score"]["of_plain_read"], 0.85))
    return claims


def main(arguments: list[str] | None = None) -> None:
    add = parser(__doc__ or "")
    add.add_argument("--dir", type=Path, default=None, help="where the temporary stores go [default: the system's]")
    add.add_argument("--threads", type=int, default=2, help="of the parallel plain read")
    add.add_argument("--rounds", type=int, default=None, help="[default: 7]")
    options = add.parse_args(arguments)
    sizes, width, shard_rows = (QUICK_CURVE, 256, 256) if options.quick else (CURVE, PRODUCTION_WIDTH, SHARD_ROWS)
    rounds = options.rounds or (1 if options.quick else 7)
    with workspace(options.dir, need=int(max(sizes) * width * 2.1)) as folder:
        stores = build(folder, (shard_rows, *sizes), width, shard_rows)
        direction = folder / "direction.npy"
        np.save(direction, np.random.default_rng(1).standard_normal(width, dtype=np.float32))
        commands = {rows: Command(store, direction, rows) for rows, store in stores.items()}
        results = run_all(commands, sizes[1], rounds, options)
    workload = {
        "rows": list(sizes),
        "width": width,
        "dtype": "float16",
        "shard_rows": shard_rows,
        "directions": 1,
        "bytes": {rows: command.bytes for rows, command in commands.items()},
    }
    claims = claims_of(results, sizes)
    record("bench_score_store", options, workload=workload, results=results, claims=claims)


def run_all(commands: dict[int, Command], middle: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    results = {"warm": warm(commands, middle, rounds, options)}
    return {**results, "cold": cold(commands[middle], commands[min(commands)], min(3, rounds))}


if __name__ == "__main__":
    main()
