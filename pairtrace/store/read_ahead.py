"""Work that is done ahead of its consumer, in order and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    items: Iterable[Item], load: Callable[[Item], Result], *, count: int, threads: int
) -> Iterator[tuple[Item, Result]]:
    """Load items in threads ahead of the consumer.

    Besides the result that the consumer works on, at most `count` are finished or in the making.

    Args:
        items: what to load, in the order wanted.
        load: makes a result from an item; runs in another thread unless `count` is 0.
        count: items to load ahead; 0 loads each when it is asked for.
        threads: number of threads.

    Yields:
        item and result, in the order of `items`. What `load` raises is raised here, in its place in the order; the
        threads have ended when the iterator is exhausted, fails or is closed.
    """
    if count == 0:
        for item in items:
            yield item, load(item)
        return
    waiting = iter(items)
    pending: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(min(threads, count), thread_name_prefix="pairtrace-read-ahead")
    try:
        for item in islice(waiting, count):
            pending.append((item, pool.submit(load, item)))
        while pending:
            item, future = pending.popleft()
            wait((future,))
            # Only now: while the consumer waits, no more than `count` are in the making.
            for following in islice(waiting, 1):
                pending.append((following, pool.submit(load, following)))
            yield item, future.result()
            del future  # the consumer decides how long a result lives
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
