"""One writer per store: an advisory lock that dies with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType

from pairtrace.errors import StoreLockedError

logger = logging.getLogger(__name__)

# Some network file systems are mounted without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# Inside the directory of an array, where Zarr readers look for nothing but chunks: beside the arrays, a
# group listing would warn about an object that is no Zarr node.
LOCK_KEY = "status/.lock"


def take_lock(handle: int, path: Path) -> None:
    """Lock an open file for one process, at once; a file system without locks is warned of and taken as it is.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; make sure that only one writer runs", path)


def give_lock_back(handle: int) -> None:
    """End what `take_lock` began; closing the file alone would leave the lock to forked processes that share it."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_UN)


class WriterLock:
    """An exclusive lock on a local store, held until `release` or the end of the process.

    The file stays behind, without meaning: removing it would let two writers lock two different files.

    Raises:
        StoreLockedError: another process holds it.
    """

    def __init__(self, root: Path) -> None:
        path = root / LOCK_KEY
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            take_lock(self._handle, root)
        except BlockingIOError as error:
            holder = os.read(self._handle, 200).decode("utf-8", "replace").strip() or "another process"
            self._close()
            raise StoreLockedError(
                f"{root} is being written by {holder}; wait for it to finish, or choose another path"
            ) from error
        except OSError:
            self._close()
            raise
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process write."""
        if self._handle is not None:
            give_lock_back(self._handle)
            self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
