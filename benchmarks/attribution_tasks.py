"""Tasks of a long benchmark: run in a few processes, each kept in a file of its own, so that a killed run goes on.

A task is a function of a module beside this file and its arguments; it runs once what it needs is there. A task that
fails stops those that need it and no others.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import say

from pairtrace.engine.atomic import replacing

# One thread in each of two processes beats two threads in one.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work.

    Attributes:
        name: also the path of its result, `{work}/results/{name}.json`.
        function: "module:function"; called with the folder of the work, the results of `needs`, and the arguments.
        arguments: plain JSON values.
        needs: names of the tasks whose results it is given.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def identities(tasks: Sequence[Task]) -> dict[str, str]:
    """A fingerprint of each task: of its arguments and of all that it needs."""
    made: dict[str, str] = {}
    for task in tasks:
        content = [task.function, task.arguments, [made[name] for name in task.needs]]
        made[task.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return made


def result_path(work: Path, name: str) -> Path:
    return work / "results" / f"{name}.json"


def load_result(work: Path, name: str, identity: str) -> dict[str, Any] | None:
    """What a finished task left: `result`, `seconds` and `cpu_seconds`. None where it did not run as it is now."""
    path = result_path(work, name)
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content["identity"] == identity else None


def run_task(work: Path, task: Task, identity: str, identities_of_needs: Mapping[str, str]) -> dict[str, Any]:
    """Run a task in this process and keep its result."""
    begun, worked = time.perf_counter(), time.process_time()
    needed = {}
    for name, print_of in identities_of_needs.items():
        found = load_result(work, name, print_of)
        assert found is not None, name
        needed[name] = found["result"]
    module, _, name = task.function.partition(":")
    result = getattr(importlib.import_module(module), name)(work, needed, **task.arguments)
    content = {
        "identity": identity,
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - worked,
        "result": result,
    }
    with replacing(result_path(work, task.name)) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    return content


def run_tasks(tasks: Sequence[Task], work: Path, processes: int = 2) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Run what is not there yet, in the order given as far as the needs allow.

    Returns:
        The result files of the finished tasks by name, and the names of those that failed or could not be run.
    """
    prints = identities(tasks)
    done = {task.name: found for task in tasks if (found := load_result(work, task.name, prints[task.name]))}
    waiting = [task for task in tasks if task.name not in done]
    failed: set[str] = set()
    say(f"{len(done)} of {len(tasks)} tasks are done, {len(waiting)} to run")
    begun = time.perf_counter()
    # Fresh processes: a forked one would share the state of libraries that have been started here.
    with _environment(ONE_THREAD), ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], Task] = {}
        while waiting or running:
            blocked = [task for task in waiting if failed & set(task.needs)]
            failed |= {task.name for task in blocked}
            waiting = [task for task in waiting if task not in blocked]
            ready = [task for task in waiting if all(name in done for name in task.needs)]
            for task in ready[: processes - len(running)]:
                needs = {name: prints[name] for name in task.needs}
                running[pool.submit(run_task, work, task, prints[task.name], needs)] = task
                waiting.remove(task)
            if not running:
                assert not waiting or blocked, [task.name for task in waiting]
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                error = future.exception()
                if error is not None:
                    failed.add(task.name)
                    say(f"{task.name} failed:\n{''.join(traceback.format_exception(error))}")
                    continue
                done[task.name] = future.result()
                minutes = (time.perf_counter() - begun) / 60
                say(f"{minutes:5.1f} min  {len(done)}/{len(tasks)}  {task.name}: {done[task.name]['seconds']:.0f} s")
    return done, [task.name for task in tasks if task.name in failed]


def run_or_exit(tasks: Sequence[Task], work: Path, processes: int) -> dict[str, dict[str, Any]]:
    """`run_tasks` for a benchmark that can say nothing unless all are done."""
    done, failed = run_tasks(tasks, work, processes)
    if failed:
        sys.exit(f"{len(failed)} of {len(tasks)} tasks failed; run again to repeat them: {', '.join(failed)}")
    return done


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ |= values
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
