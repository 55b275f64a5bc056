"""Dask clusters: an existing one behind an address, or one of processes on this machine; and what may go wrong there.

Only small things belong on the scheduler's connections: paths, numbers of shards, scores, sums. Workers read and write
shards themselves.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pairtrace.errors import ConfigError, MissingDependencyError, StoreDamagedError, StoreError
from pairtrace.store.dask_view import open_rows, store_identity
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader
from pairtrace.version import __version__

CONNECT_SECONDS = 10


def _parts(address: str) -> SplitResult:
    return urlsplit(address if "://" in address else f"tcp://{address}")


def require_address(address: str) -> None:
    """Find out without a connection that an address has a host and a port, or names a scheduler in this process.

    Raises:
        ConfigError: it does not.
    """
    parts = _parts(address)
    try:
        usable = parts.scheme == "inproc" or (parts.hostname and parts.port)
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ConfigError(
            f"--scheduler is {address!r}; expected an address like tcp://host:8786, as dask scheduler prints it"
        )


def connect(address: str) -> Any:
    """A `distributed.Client` of the scheduler at an address, for example tcp://host:8786; close it after use.

    Raises:
        ConfigError: it is no address, or nothing answers there.
        MissingDependencyError: Dask is not installed.
    """
    require_address(address)
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingDependencyError("dask[distributed]", "discover", "--scheduler") from error
    _require_greeting(address)
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address!r} within {CONNECT_SECONDS} s ({error}); expected an address like "
            "tcp://host:8786, as dask scheduler prints it"
        ) from error


def _require_greeting(address: str) -> None:
    """A Dask server speaks first; a client waits for ever for one that accepts connections and stays silent.

    Raises:
        ConfigError: it does. (What refuses a connection may be about to start: that is left to the client.)
    """
    parts = _parts(address)
    if parts.scheme != "tcp":
        return
    try:
        with socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS) as connection:
            connection.recv(1)
    except TimeoutError as error:
        raise ConfigError(
            f"what listens at {address!r} has said nothing for {CONNECT_SECONDS} s, so that it is no Dask scheduler; "
            "expected an address like tcp://host:8786, as dask scheduler prints it"
        ) from error
    except OSError:
        return


def check_workers(client: Any, address: str) -> int:
    """Number of threads of all workers, which have this version of pairtrace.

    Raises:
        ConfigError: there are no workers, or one has another version.
    """
    threads: int = sum(client.nthreads().values())
    if not threads:
        raise ConfigError(f"the Dask scheduler at {address} has no workers; start some with: dask worker {address}")
    found = client.run(_worker_version, on_error="return")
    for worker, version in found.items():
        if version != __version__:
            raise ConfigError(
                f"the Dask worker at {worker} has another pairtrace ({version}) than this one ({__version__}); install "
                "the same version on every worker"
            )
    return threads


def require_store(client: Any, store: ActivationStore) -> None:
    """Find out before long work that every worker sees a store.

    Raises:
        StoreError: one does not, or sees another one at the same path.
        ConfigError: the cluster fails.
    """
    identity = store_identity(store.manifest)
    opened = [
        client.submit(_opens, store.address, identity, workers=[worker], pure=False) for worker in client.nthreads()
    ]
    with cluster_failures(client.scheduler.address):
        client.gather(opened)


@contextmanager
def cluster_failures(address: str) -> Iterator[None]:
    """Around waiting for results: what a cluster does wrong becomes an error for the user.

    A lost worker is none: the scheduler gives its work to another one. What a task raises passes through, apart from
    an OSError, which says little without the place.

    Args:
        address: of the scheduler, for the message.

    Raises:
        ConfigError: the scheduler is gone, or the workers died again and again of the same task.
    """
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    try:
        yield
    except (KilledWorker, FutureCancelledError, OSError) as error:
        reason = " ".join(str(error).split())  # Dask's have several lines
        raise ConfigError(f"the Dask cluster at {address} failed: {reason}; run the same command again") from error


@contextmanager
def discovery_client(address: str | None, *, workers: int | None = None) -> Iterator[Any]:
    """A `distributed.Client` for as long as the context lasts.

    A script that is run as a file has to call this below `if __name__ == "__main__":`, since the processes of a local
    cluster import it again.

    Args:
        address: of an existing scheduler, whose workers are checked and left running; None starts processes here,
            one thread each, which share the machine's memory and end with the context (or with this process).
        workers: processes of a local cluster; None for one per core that this process may use.

    Raises:
        ConfigError: as for `connect` and `check_workers`, or the processes do not start.
        MissingDependencyError: Dask is not installed.
    """
    if address is not None:
        with closing(connect(address)) as client:
            check_workers(client, address)
            yield client
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingDependencyError("dask[distributed]", "discover", "work on more than one core") from error
    with (
        _quiet("distributed"),
        _processes(workers) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _processes(workers: int | None) -> Any:
    """A running `LocalCluster`."""
    from distributed import LocalCluster

    try:
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # of its health page; 8787 may be taken
            silence_logs=logging.ERROR,
            env={"NUMBA_NUM_THREADS": "1"},
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the worker processes do not start ({error}); a script has to do its work below "
            'if __name__ == "__main__":, and --scheduler uses workers that run already'
        ) from error


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Errors only: Dask would tell whoever runs a command of every connection, and of every process slow to end."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(before)


# On the workers


def _worker_version() -> str:
    from pairtrace.version import __version__ as version

    return version


def _opens(path: str, identity: str) -> None:
    open_store_rows(path, identity)


def given(value: Any) -> Any:
    """A task that holds what others need: it travels once to each worker, and outlives any of them."""
    return value


def open_store_rows(path: str, identity: str) -> RowReader:
    """`open_rows` inside a task; the message says which worker cannot open the store.

    Raises:
        StoreError: there is no such store at this path there, or another one.
        StoreDamagedError: it is damaged.
    """
    from distributed import get_worker

    try:
        return open_rows(path, identity)
    except StoreDamagedError:
        raise
    except StoreError as error:
        raise StoreError(
            f"the Dask worker at {get_worker().address} cannot open the store: {error}; every worker has to see it at "
            "this path"
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside a task: compiled kernels and matrix products use the task's own thread only.

    A cluster has as many tasks at work as it has cores, and sums come out the same wherever they are made. Matrix
    products stay on one thread for as long as the worker's process lives: their library has one setting for all
    threads, so that a task which gave it back would take it from the others.
    """
    import numba

    _one_thread_for_products()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)  # of this thread only
    try:
        yield
    finally:
        numba.set_num_threads(threads)


@lru_cache(maxsize=1)
def _one_thread_for_products() -> None:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError as error:
        raise MissingDependencyError("threadpoolctl", "discover", "work on a Dask cluster") from error
    import numpy as np

    np.ones((1, 1)) @ np.ones((1, 1))  # now its library is loaded
    ThreadpoolController().limit(limits=1, user_api="blas")
