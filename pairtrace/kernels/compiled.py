"""How the CPU kernels are compiled and run: imported only by modules that are imported only when they run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event

logger = logging.getLogger(__name__)

_told = threading.Event()

# Numba's fallback threading layer ends the process when two Python threads enter a parallel region at once.
_PARALLEL_REGION = threading.Lock()


def parallel(function: Callable[..., Any]) -> Any:
    """Compile for several threads, cached on disk where a cache directory can be written.

    The interpreter's lock is released while the kernel runs: other Python threads (readers, writers) go on.
    """
    return _compiled(function, parallel=True)


def single_threaded(function: Callable[..., Any]) -> Any:
    """Compile for the calling thread alone, otherwise as `parallel`; several threads may call it at once."""
    return _compiled(function, parallel=False)


def _compiled(function: Callable[..., Any], *, parallel: bool) -> Any:
    try:
        return numba.njit(parallel=parallel, nogil=True, cache=True)(function)
    except RuntimeError as error:  # "no locator available": neither the package nor the user cache is writable
        logger.debug("compiled kernels are not cached: %s", error)
        return numba.njit(parallel=parallel, nogil=True)(function)


def run(kernel: Any, *arguments: Any) -> Any:
    """Call a kernel made by `parallel`; calls from several Python threads wait for each other."""
    with _PARALLEL_REGION:
        return call(kernel, *arguments)


def call(kernel: Any, *arguments: Any) -> Any:
    """Call a kernel made by `single_threaded`; several Python threads may do so at once."""
    try:
        return kernel(*arguments) if kernel.signatures else _first_call(kernel, *arguments)
    except OSError as error:  # the cache could not be written (full disk); the compiled code is there all the same
        logger.debug("compiled kernels are not cached: %s", error)
        return kernel(*arguments)


def _first_call(kernel: Any, *arguments: Any) -> Any:
    """The first call of a process loads compiled code, or compiles it where none is kept, which is worth a word."""
    with event.install_listener("numba:compile", _CompilationNote()):
        return kernel(*arguments)


class _CompilationNote(event.Listener):
    """Logs once per process that kernels are being compiled; code that is loaded does not make this event."""

    def on_start(self, event: event.Event) -> None:
        if not _told.is_set():
            _told.set()
            logger.info("compiling the kernels for this machine, once: up to a minute")

    def on_end(self, event: event.Event) -> None:
        pass
