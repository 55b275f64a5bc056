"""A Dask scheduler and its workers as separate processes, started as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distributed import Client


@dataclass(frozen=True)
class RunningCluster:
    address: str
    scheduler: subprocess.Popen[bytes]
    workers: tuple[subprocess.Popen[bytes], ...]


@contextmanager
def running_cluster(root: Path, *, workers: int = 2, first: tuple[str, ...] = ()) -> Iterator[RunningCluster]:
    """One thread per worker and no nanny, so that a killed worker stays dead; all are killed at the end.

    `first` are further options of the first worker.
    """
    file = str(root / "scheduler.json")
    worker = ["worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    scheduler = ["scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", file]
    commands = [scheduler, [*worker, *first], *[worker] * (workers - 1)]
    running = [
        subprocess.Popen([sys.executable, "-m", "dask", *command], stderr=subprocess.DEVNULL, cwd=root)
        for command in commands
    ]
    try:
        while not Path(file).exists():
            assert running[0].poll() is None, "the scheduler has ended"
            time.sleep(0.1)
        with Client(scheduler_file=file, set_as_default=False, timeout=120) as client:
            client.wait_for_workers(workers, timeout=120)
            address = client.scheduler.address
        yield RunningCluster(address, running[0], tuple(running[1:]))
    finally:
        for process in running:
            process.kill()
            process.wait()


def kill_a_worker(address: str) -> None:
    """Kill one worker of the cluster as a lost machine would."""
    with Client(address, set_as_default=False) as client:
        os.kill(min(client.run(os.getpid).values()), signal.SIGKILL)
