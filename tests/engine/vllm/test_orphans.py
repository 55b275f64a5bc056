"""Engines do not outlive the process that started them, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pairtrace.engine.vllm.orphans import OrphanWatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs file descriptors of processes")

# Stands for a run: starts "engines", one of which does not hear SIGTERM, has them watched, and says their numbers.
RUN = """
import subprocess, sys, time
from pairtrace.engine.vllm.orphans import OrphanWatch

deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
engines = [
    subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    for code in ("import time; print(flush=True); time.sleep(600)", deaf)
]
for engine in engines:
    engine.stdout.readline()
watch = OrphanWatch([engine.pid for engine in engines])
print(*(engine.pid for engine in engines), flush=True)
sys.stdin.readline()
watch.stop()
"""


@pytest.fixture
def run() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def is_running(process: int) -> bool:
    """Not a zombie that nobody has waited for, either."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def engines_of(run: subprocess.Popen[bytes]) -> list[int]:
    assert run.stdout is not None
    engines = [int(number) for number in run.stdout.readline().split()]
    assert len(engines) == 2 and all(map(is_running, engines))
    return engines


def test_a_killed_run_takes_its_engines_with_it(run: subprocess.Popen[bytes]) -> None:
    engines = engines_of(run)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 60
    while any(map(is_running, engines)):
        assert time.monotonic() < deadline, "engines outlive their run"
        time.sleep(0.1)


def test_a_run_that_lets_go_ends_none(run: subprocess.Popen[bytes]) -> None:
    engines = engines_of(run)
    try:
        run.communicate(b"end\n")
        assert run.returncode == 0
        time.sleep(0.5)
        assert all(map(is_running, engines))
    finally:
        for engine in engines:
            os.kill(engine, signal.SIGKILL)


def test_nothing_to_watch_starts_nothing() -> None:
    watch = OrphanWatch([])
    assert watch._watch is None
    watch.stop()


def test_one_that_is_gone_already_is_no_matter() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    watch = OrphanWatch([gone.pid])
    process = watch._watch
    watch.stop()
    assert process is not None and process.returncode == 0
