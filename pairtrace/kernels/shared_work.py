"""Work with matrix products, shared among threads so that their number changes no bit.

Imported only when it runs, because Numba is heavy. Every thread takes one item after the other and calls a BLAS that is
kept to one thread: handing every block from Numba's threads to those of BLAS and back made scoring several times slower
by the clock on a busy machine, and a BLAS that splits a product itself may add in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numba

Item = TypeVar("Item")

# The limit on BLAS threads belongs to the process: two calls at once would restore each other's.
_LIMIT = threading.Lock()


@cache
def _blas() -> Any:
    """The process's BLAS libraries; finding them takes milliseconds."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread in this process; others who want that wait for the end."""
    with _LIMIT, _blas().limit(limits=1):
        yield


def share(work: Callable[[Iterator[Item]], None], items: Sequence[Item]) -> None:
    """Run `work` in as many threads as Numba has; all take their items from one iterator.

    Args:
        work: called once per thread; it goes through the items it gets, each of which goes to one thread only.
        items: what there is to do; what is done for an item may depend on nothing but the item.
    """
    shared = iter(items)
    helpers = min(numba.get_num_threads(), len(items)) - 1
    with one_blas_thread():
        if helpers < 1:
            work(shared)
            return
        with ThreadPoolExecutor(helpers) as pool:
            others = [pool.submit(work, shared) for _ in range(helpers)]
            work(shared)
            for other in others:
                other.result()
