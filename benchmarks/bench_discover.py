"""Clusters among up to a million directions, against exact HDBSCAN and its fast relatives.

    python benchmarks/bench_discover.py            # 20,000, 100,000 and 1,000,000 rows; half an hour on two cores
    python benchmarks/bench_discover.py --quick    # 3,000 rows

The rows are a planted mixture: 40 random directions of width 256, each with members at one cosine, drawn from 0.35 to
0.6, and sizes up to four times the smallest; 20 % of the rows point anywhere. pairtrace goes the whole way: out-of-core
reduction to 50 components on a local Dask cluster, neighbour graph, hierarchy, clusters. The others are given the
reduced rows and only cluster: "hdbscan-exact", the reference, is an exact algorithm of the package, "hdbscan" its
default. Every run is a process of its own with a time limit; its memory is the largest sum over its processes (each
page shared among them counted once). Each clusters a few rows before its clock starts, because numba compiles at the
first call. A method that did not finish is not started on more rows.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from discover_rows import (
    CLUSTERS,
    COMPETITORS,
    COSINES,
    MIN_SAMPLES,
    NOISE,
    REDUCED,
    REFERENCE,
    UNEVEN,
    WIDTH,
    write_rows,
)
from harness import Claim, at_least, at_most, parser, record, say, workspace

SIZES = (20_000, 100_000, 1_000_000)
QUICK_SIZES = (3_000,)
PACKAGES = ("hdbscan", "fast-hdbscan", "scikit-learn", "evoc")
# Rows for each row of the smallest cluster that may be found.
ROWS_PER_MINIMUM = 400


def tree_memory(process: psutil.Process) -> int:
    """Bytes that a process and its descendants take, each shared page in equal parts."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def run_method(method: str, folder: Path, min_cluster_size: int, limit: float) -> dict[str, Any]:
    """What a run in a process of its own told, and its peak memory; or why it did not finish."""
    script = str(Path(__file__).with_name("discover_rows.py"))
    command = [sys.executable, script, method, str(folder), str(min_cluster_size)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begun = time.monotonic()
        process = psutil.Popen(command, stdout=out, stderr=errors)
        peak = 0
        while True:
            try:
                process.wait(timeout=0.25)
                break
            except psutil.TimeoutExpired:
                peak = max(peak, tree_memory(process))
            if time.monotonic() - begun > limit:
                for one in [*process.children(recursive=True), process]:
                    one.kill()
                process.wait()
                say(f"  {method}: stopped after {limit:.0f} s")
                return {"finished": False, "why": f"over {limit:,.0f}"}
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            say(f"  {method}: failed with exit code {process.returncode}\n{errors.read()[-1500:]}")
            return {"finished": False, "why": "failed"}
        told: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return {"finished": True, **told, "peak_memory_gb": peak / 1e9, "wall_seconds": time.monotonic() - begun}


def quality(labels: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """Agreement with what was planted."""
    from sklearn.metrics import adjusted_rand_score

    both = (labels >= 0) & (planted >= 0)
    return {
        "clusters": int(labels.max()) + 1,
        "ari_planted": float(adjusted_rand_score(planted, labels)),
        "ari_planted_clustered": float(adjusted_rand_score(planted[both], labels[both])),
        "noise_recall": float((labels[planted < 0] < 0).mean()),
        "members_clustered": float((labels[planted >= 0] >= 0).mean()),
    }


def agreement(labels: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Agreement with the exact run, on rows that both call clustered, and on its noise."""
    from sklearn.metrics import adjusted_rand_score

    both = (labels >= 0) & (exact >= 0)
    return {
        "ari_exact_clustered": float(adjusted_rand_score(exact[both], labels[both])),
        "ari_exact": float(adjusted_rand_score(exact, labels)),
        "exact_noise_recall": float((labels[exact < 0] < 0).mean()) if (exact < 0).any() else 1.0,
    }


def measure(
    rows: int, folder: Path, limits: tuple[float, float], methods: list[str], repeats: int
) -> dict[str, dict[str, Any]]:
    """Run the methods; `limits` are pairtrace's and everyone else's."""
    planted = write_rows(folder, rows, seed=0)
    minimum = max(10, rows // ROWS_PER_MINIMUM)
    results: dict[str, dict[str, Any]] = {}
    for method in methods:
        runs = []
        for _ in range(repeats if method == "pairtrace" else 1):
            told = run_method(method, folder, minimum, limits[method != "pairtrace"])
            runs.append(told)
            if not told["finished"]:
                break
            say(f"  {method}, {rows:,} rows: {told['seconds']:.1f} s, {told['peak_memory_gb']:.2f} GB")
        if not runs[-1]["finished"]:
            results[method] = runs[-1]
            continue
        seconds = [told["seconds"] for told in runs]
        labels = np.load(folder / f"{method}.npy")
        results[method] = {
            **runs[-1],
            "seconds": statistics.median(seconds),
            "runs": seconds,
            "peak_memory_gb": max(told["peak_memory_gb"] for told in runs),
            **quality(labels, planted),
        }
        reference = results.get(REFERENCE, {"finished": False})
        if method == REFERENCE:
            others = [name for name, told in results.items() if told["finished"] and name != method]
        else:
            others = [method] if reference["finished"] else []
        for name in others:
            results[name] |= agreement(np.load(folder / f"{name}.npy"), np.load(folder / f"{REFERENCE}.npy"))
    return results


def claims(results: dict[str, dict[str, dict[str, Any]]]) -> list[Claim]:
    ours = {int(rows): methods["pairtrace"] for rows, methods in results.items()}
    small, middle, large = SIZES
    made = []
    if "ari_exact_clustered" in ours.get(small, {}):
        made.append(at_least("agreement with exact HDBSCAN, 20,000 rows", ours[small]["ari_exact_clustered"], 0.95))
    if ours.get(large, {}).get("finished"):
        made += [
            at_most("1,000,000 rows, minutes", ours[large]["wall_seconds"] / 60, 12),
            at_most("1,000,000 rows, peak memory in GB", ours[large]["peak_memory_gb"], 5),
        ]
        if ours.get(middle, {}).get("finished"):
            for what, key in (("", "seconds"), (" of the clustering alone", "seconds_clustering")):
                growth = math.log(ours[large][key] / ours[middle][key]) / math.log(large / middle)
                made.append(at_most(f"growth exponent from 100,000 to 1,000,000 rows{what}", growth, 1.2))
    return made


def main(arguments: list[str] | None = None) -> None:
    add = parser(__doc__ or "")
    add.add_argument("--dir", type=Path, default=None, help="where the temporary files go [default: the system's]")
    add.add_argument("--rows", type=int, nargs="+", default=None, help="[default: 20000 100000 1000000]")
    add.add_argument("--limit", type=float, default=900.0, help="seconds after which a run of pairtrace is stopped")
    add.add_argument("--rival-limit", type=float, default=130.0, help="seconds after which any other run is stopped")
    add.add_argument("--repeats", type=int, default=1, help="runs of pairtrace at each size; their median counts")
    add.add_argument("--only", nargs="+", default=None, choices=list(COMPETITORS), help="competitors [default: all]")
    options = add.parse_args(arguments)
    limits = (options.limit, options.rival_limit)
    sizes = options.rows or (QUICK_SIZES if options.quick else SIZES)
    absent = [name for name, (_, package) in COMPETITORS.items() if find_spec(package) is None]
    for name in absent:
        say(f"{name} is not installed and left out")
    methods = ["pairtrace", *(name for name in options.only or COMPETITORS if name not in absent)]
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for rows in sorted(sizes):
        say(f"{rows:,} rows")
        with workspace(options.dir, need=rows * (WIDTH * 2 + REDUCED * 4 + 40)) as folder:
            results[str(rows)] = measure(rows, folder, limits, methods, options.repeats)
        methods = [name for name in methods if results[str(rows)][name]["finished"] or name == "pairtrace"]
    workload = {
        "directions": CLUSTERS,
        "width": WIDTH,
        "reduced": REDUCED,
        "noise": NOISE,
        "cosines": COSINES,
        "uneven": UNEVEN,
        "min_samples": MIN_SAMPLES,
        "rows_per_minimum": ROWS_PER_MINIMUM,
        "limit_seconds": limits[0],
        "rival_limit_seconds": limits[1],
        "competitors": {name: metadata.version(name) for name in PACKAGES if name not in absent},
        "not_installed": absent,
        "cores": psutil.cpu_count(),
    }
    record("bench_discover", options, workload=workload, results=results, claims=claims(results))


if __name__ == "__main__":
    main()
