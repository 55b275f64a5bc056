"""Local clusters: how their processes are set up, and that they end. Addresses are tested with `score --scheduler`."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import warnings

import pytest

from pairtrace.engine import dask_cluster
from pairtrace.engine.dask_cluster import cluster_failures, connect, discovery_client, require_address
from pairtrace.errors import ConfigError, StoreError


def test_a_local_cluster_has_single_threads_and_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no complaint about a port that is taken
        with discovery_client(None, workers=1) as client:
            assert list(client.nthreads().values()) == [1]
            (worker,) = client.scheduler_info()["workers"].values()
            assert worker["memory_limit"] > 0
            (process,) = client.run(os.getpid).values()
            assert process != os.getpid()
            logging.getLogger("distributed.nanny").warning("Worker process still alive after 4.0 seconds, killing")
    assert not caplog.records
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_task_uses_one_thread_whatever_its_worker_was_started_with() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import numba, numpy as np
from threadpoolctl import threadpool_info
from pairtrace.engine.dask_cluster import one_thread

def products():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

def task(_):
    with one_thread():
        return numba.get_num_threads(), products()

np.ones((1, 1)) @ np.ones((1, 1))
before = products()
with ThreadPoolExecutor(2) as pool:
    assert list(pool.map(task, range(4))) == [(1, {1})] * 4, before
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("address", ["rubbish", "", "tcp://host", "tcp://host:port", "host:99999"])
def test_an_address_without_host_and_port_is_refused_before_a_connection(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributed.Client.__init__", lambda *_, **__: pytest.fail("a connection was tried"))
    with pytest.raises(ConfigError, match=rf"--scheduler is {address!r}; expected an address like tcp://host:8786"):
        connect(address)


@pytest.mark.parametrize("address", ["host:8786", "tcp://[::1]:8786", "tls://host:1", "inproc://10.0.0.1/5/6"])
def test_addresses_of_every_kind_may_be_tried(address: str) -> None:
    require_address(address)


def test_failures_of_a_cluster_become_errors_for_the_user() -> None:
    text = r"cluster at tcp://x:1 failed: gone; run the same command again"
    with pytest.raises(ConfigError, match=text), cluster_failures("tcp://x:1"):
        raise OSError("gone")
    with pytest.raises(StoreError, match="damaged"), cluster_failures("tcp://x:1"):
        raise StoreError("damaged")


def test_a_port_that_says_nothing_is_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"what listens at '{address}' has said nothing for 0\.3 s"):
            connect(address)
