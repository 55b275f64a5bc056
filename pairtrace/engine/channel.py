"""Hand-over between the threads of a stage: bounded, so memory stays bounded, and unable to hang on an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# How long a side waits before it looks whether the other one is still there, in seconds.
_PATIENCE = 0.1


class Channel(Generic[T]):
    """A bounded queue between two threads in which an error on either side stops both."""

    _END = object()

    def __init__(self, depth: int = 2) -> None:
        self._queue: Queue[Any] = Queue(maxsize=depth)
        self._stopped = threading.Event()
        self.error: BaseException | None = None

    def put(self, item: T | object) -> bool:
        """Hand over an item, waiting for room; False when the other side has stopped."""
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put(item, timeout=_PATIENCE)
                return True
        return False

    def close(self) -> None:
        """Say that nothing more will come."""
        self.put(self._END)

    def stop(self, error: BaseException | None = None) -> None:
        """End the exchange at once; `error` reaches whoever looks."""
        if error is not None and self.error is None:
            self.error = error
        self._stopped.set()

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self._queue.get(timeout=_PATIENCE)
            except Empty:
                if self._stopped.is_set():
                    return
                continue
            if item is self._END:
                return
            yield item


def run_thread(name: str, channel: Channel[Any], work: Callable[[], None]) -> threading.Thread:
    """Start `work` in a thread; whatever it raises is kept on `channel` and ends the exchange."""

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - re-raised by the main thread, nothing is swallowed
            channel.stop(error)

    thread = threading.Thread(target=guarded, name=f"pairtrace-{name}", daemon=True)
    thread.start()
    return thread
