"""Writing, reading and picking rows: the activation store against plain memory maps and other formats.

    python benchmarks/bench_store.py            # 100,000 x 4,096 float16; 9 GB of disk, under eight minutes
    python benchmarks/bench_store.py --quick    # 2,000 x 256

Every way writes the same rows in shards of 2,048 (chunks of that size where there are chunks), and every file is forced
to the disk before the time is taken, except where it says so. Reading opens the files and adds up all words of all
rows, from the page cache. Random rows are other ones in every round, and the files have just been opened: a mapping
that has been used for a while would be faster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from activations import PRODUCTION_WIDTH, SHARD_ROWS
from harness import Timing, at_least, at_most, interleave, parser, record, say, two_threads, workspace
from plain_read import as_words, files_below, sum_in_prange
from row_files import MEMMAP, Store, all_ways

from pairtrace.store.verify import verify

RANDOM_ROWS = 512


def add_up(blocks: Iterable[np.ndarray]) -> None:
    for block in blocks:
        sum_in_prange(as_words(block))


def figures(timings: dict[str, Timing], base: Timing, size: int) -> dict[str, Any]:
    return {
        name: {
            "seconds": timing.median,
            "runs": timing.runs,
            "gb_per_second": size / timing.median / 1e9,
            "speed_of_memmap": base.over(timing),
        }
        for name, timing in timings.items()
    }


def main(arguments: list[str] | None = None) -> None:
    add = parser(__doc__ or "")
    add.add_argument("--dir", type=Path, default=None, help="where the temporary files go [default: the system's]")
    add.add_argument("--rows", type=int, default=None, help="[default: 100000]")
    add.add_argument("--threads", type=int, default=two_threads(), help="that add up the words")
    options = add.parse_args(arguments)
    numba.set_num_threads(options.threads)
    count, width, shard_rows = (2_000, 256, 256) if options.quick else (100_000, PRODUCTION_WIDTH, SHARD_ROWS)
    count = options.rows or count
    rounds = 1 if options.quick else 4
    size = count * width * 2
    ways = all_ways(count, width, shard_rows)
    with workspace(options.dir, need=size * len(ways)) as work:
        folders = {name: work / str(number) for number, name in enumerate(ways)}

        def clear(name: str) -> None:
            shutil.rmtree(folders[name], ignore_errors=True)
            os.sync()

        say("writing")
        writes = {name: lambda way=way, name=name: way.write(folders[name]) for name, way in ways.items()}
        written = interleave(writes, rounds, before=clear)
        say("reading")
        reads: dict[str, Callable[[], object]] = {
            name: lambda way=way, name=name: add_up(way.read(folders[name])) for name, way in ways.items()
        }
        plain = ways["pairtrace"]
        assert isinstance(plain, Store)
        reads["pairtrace, no checksum"] = lambda: add_up(plain.read(folders["pairtrace"], checksum=False))
        del reads["pairtrace, not forced to disk"]
        read = interleave(reads, rounds + 1)
        say(f"{RANDOM_ROWS} random rows")
        rng = np.random.default_rng(0)
        opened: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

        def open_anew(name: str) -> None:
            opened[name] = ways[name].taker(folders[name])

        takes = {
            name: lambda name=name: opened[name](rng.integers(0, count, min(RANDOM_ROWS, count)))
            for name in ways
            if name in reads
        }
        took = interleave(takes, rounds + 1, before=open_anew)
        say("verifying")
        checked = interleave({"verify": lambda: verify(folders["pairtrace"])}, max(1, rounds - 1))["verify"]
        sizes = {
            name: sum(path.stat().st_size for path in files_below(folder)) / size for name, folder in folders.items()
        }
    base = {"write": written[MEMMAP], "read": read[MEMMAP], "take": took[MEMMAP]}
    results = {
        "write": figures(written, base["write"], size),
        "read": figures(read, base["read"], size),
        "take": figures(took, base["take"], min(RANDOM_ROWS, count) * width * 2),
        "verify": {"seconds": checked.median, "runs": checked.runs, "gb_per_second": size / checked.median / 1e9},
        "size_ratio": sizes,
    }
    claims = [
        at_least("writing durably: speed of np.memmap + flush + fsync", base["write"].over(written["pairtrace"]), 0.8),
        at_most(f"{RANDOM_ROWS} random rows: time of np.memmap's", took["pairtrace"].over(base["take"]), 3.0),
    ]
    workload = {"rows": count, "width": width, "shard_rows": shard_rows, "dtype": "float16", "bytes": size}
    record("bench_store", options, workload=workload, results=results, claims=claims)


if __name__ == "__main__":
    main()
