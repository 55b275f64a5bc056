"""The whole command `pairtrace score` on a store of production size, against a plain read of the same files.

    python benchmarks/bench_score_store.py            # up to 1,000,000 x 4,096; 9 GB of disk, under ten minutes
    python benchmarks/bench_score_store.py --quick    # up to 6,144 x 256

The command runs in a process of its own, twice: first on a store of one shard, which brings the imports, the command-
line parser and the compiled code (the start-up), then on the store in question, which is timed from its first line to
the end of the written table. Start-up alone and the command as it is typed are shown apart. The plain read is
`readinto` one buffer of a megabyte, one thread, file after file. Cold means that the files' pages were dropped from the
page cache, which is checked. Memory is the anonymous resident part of the process (RssAnon), sampled every 20 ms;
mapped files are page cache.
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
from harness import Claim, Timing, at_least, at_most, interleave, parser, record, say, two_threads, workspace
from plain_read import drop_from_cache, files_below, read_files, read_files_in_threads, resident_share

CURVE = (100_000, PRODUCTION_ROWS, 1_000_000)
QUICK_CURVE = (700, 2_500, 6_144)
SAMPLE_SECONDS = 0.02


# The command, first on a small store and then, timed, on the other one.
CHILD = """
import sys, time
from typer.main import get_command
from pairtrace.cli import app
pairtrace = get_command(app)
for store, out in ((sys.argv[1], sys.argv[2]), (sys.argv[3], sys.argv[4])):
    begun = time.perf_counter()
    pairtrace(["--quiet", "score", store, sys.argv[5], "--out", out, "--json"], standalone_mode=False)
print(time.perf_counter() - begun)
"""


class Command:
    """`pairtrace score` on one store, with what its runs told."""

    def __init__(self, store: Path, small: Path, direction: Path, rows: int) -> None:
        self.rows = rows
        self.files = files_below(store)
        self.bytes = sum(path.stat().st_size for path in self.files)
        self.seconds: list[float] = []
        self.peak_mib: list[float] = []
        words = [str(path) for path in (small, small.with_suffix(".parquet"), store, store.with_suffix(".parquet"))]
        self._after_small = [sys.executable, "-c", CHILD, *words, str(direction)]
        self._typed = [sys.executable, "-m", "pairtrace.cli", "--quiet", "score", words[2], str(direction)]
        self._typed += ["--out", words[3], "--json"]

    def run(self) -> None:
        """After a run on the small store; keeps the seconds."""
        *_, summary, seconds = self._process(self._after_small).splitlines()
        assert json.loads(summary)["scored"] == self.rows, summary
        self.seconds.append(float(seconds))

    def run_typed(self) -> None:
        """As it is typed."""
        self._process(self._typed)

    def _process(self, command: list[str]) -> str:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            watch = threading.Thread(target=self._watch, args=(child,))
            watch.start()
            output, notes = child.communicate()
            watch.join()
        if child.returncode or "slow reference" in notes:
            sys.exit(f"{' '.join(command)} ended with {child.returncode}: {notes}")
        if notes:
            say(notes)
        return output

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
    """Stores of several sizes; those between the smallest and the largest share the largest one's files."""
    rows = distinct_rows(width, DISTINCT_ROWS // SHARD_ROWS * shard_rows)
    stores = {size: folder / f"{size}.zarr" for size in sizes}
    for size in sorted(sizes, reverse=True):
        manifest = make_manifest(size, width, shard_rows=shard_rows)
        begun = time.perf_counter()
        if size in (min(sizes), max(sizes)):
            write_store(stores[size], manifest, rows, fsync=False)
        else:
            first_rows(stores[size], stores[max(sizes)], manifest, rows)
        say(f"store of {size:,} rows: {time.perf_counter() - begun:.1f} s")
    return stores


def timings_of(seconds: Timing, size: int) -> dict[str, Any]:
    return {**asdict(seconds), "gb_per_second": size / seconds.median / 1e9}


def warm(commands: dict[int, Command], middle: int, repeats: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything from the page cache: the curve over the sizes, and the plain reads of the middle one."""
    small, chosen = commands[min(commands)], commands[middle]
    curve = [command for command in commands.values() if command is not small]
    for command in commands.values():
        read_files(command.files)
    runs: dict[str, Callable[[], object]] = {
        "plain read": lambda: read_files(chosen.files),
        f"plain read, {options.threads} threads": lambda: read_files_in_threads(chosen.files, options.threads),
        "start-up": small.run_typed,
        f"command as typed, {middle:,} rows": chosen.run_typed,
        **{f"score {command.rows:,} rows": command.run for command in curve},
    }
    seconds = interleave(runs, repeats, warm_up=0 if options.quick else 1)
    results: dict[str, Any] = {name: asdict(seconds[name]) for name in list(runs)[2:4]}
    results |= {name: timings_of(seconds[name], chosen.bytes) for name in list(runs)[:2]}
    for command in curve:
        own = Timing.of(command.seconds[-repeats:])
        results[f"score {command.rows:,} rows"] = {
            **timings_of(own, command.bytes),
            "rows": command.rows,
            "seconds_per_million_rows": own.median / command.rows * 1e6,
            "of_plain_read": own.over(seconds["plain read"]) * chosen.bytes / command.bytes,
            "peak_anonymous_mib": max(command.peak_mib),
        }
    return results


def cold(command: Command, repeats: int) -> dict[str, Any]:
    """From the disk: the command and the plain read in turn, each after the pages were dropped."""
    left = drop_from_cache(command.files)
    if left > 0.01:
        say(f"{left:.0%} of the pages stay in the page cache: the cold runs are left out")
        return {"pages_left": left}
    shares = [left]
    runs = {"plain read": lambda: read_files(command.files), "score": command.run}
    found = interleave(runs, repeats, warm_up=0, before=lambda _: shares.append(drop_from_cache(command.files)))
    own = Timing.of(command.seconds[-repeats:])
    return {
        "pages_left": max(shares),
        "pages_after_score": resident_share(command.files),
        "plain read": timings_of(found["plain read"], command.bytes),
        "score": {**timings_of(own, command.bytes), "of_plain_read": found["plain read"].over(own)},
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
    add.add_argument("--threads", type=int, default=two_threads(), help="of the parallel plain read")
    add.add_argument("--rounds", type=int, default=None, help="[default: 7]")
    options = add.parse_args(arguments)
    sizes, width, shard_rows = (QUICK_CURVE, 256, 256) if options.quick else (CURVE, PRODUCTION_WIDTH, SHARD_ROWS)
    rounds = options.rounds or (1 if options.quick else 7)
    with workspace(options.dir, need=int(max(sizes) * width * 2.1)) as folder:
        stores = build(folder, (shard_rows, *sizes), width, shard_rows)
        direction = folder / "direction.npy"
        np.save(direction, np.random.default_rng(1).standard_normal(width, dtype=np.float32))
        small = stores[shard_rows]
        commands = {rows: Command(store, small, direction, rows) for rows, store in stores.items()}
        results = {
            "warm": warm(commands, sizes[1], rounds, options),
            "cold": cold(commands[sizes[1]], min(3, rounds)),
        }
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


if __name__ == "__main__":
    main()
