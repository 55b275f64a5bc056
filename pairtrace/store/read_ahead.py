"""Work that is done ahead of its consumer, in order and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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


def asked_ahead(
    items: Sequence[Item], is_here: Callable[[Item], bool], ask: Callable[[Item], object], *, count: int
) -> Generator[Item]:
    """Hand out items, and ask for the next ones in another thread where they are not here yet; never wait for them.

    Args:
        items: in the order wanted.
        is_here: whether there is no need to ask; quick.
        ask: begins to bring an item; must not fail.
        count: items to ask for ahead.

    Yields:
        The items in their order. The thread, which is only started when something is asked for, has ended when the
        iterator is exhausted or closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="pairtrace-read-ahead")
    try:
        asked = 0
        for position, item in enumerate(items):
            for following in items[asked : position + count + 1]:
                if not is_here(following):
                    pool.submit(ask, following)
            asked = position + count + 1
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
