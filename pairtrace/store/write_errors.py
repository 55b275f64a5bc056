"""What the system says about a failed write, in words that tell what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pairtrace.errors import StoreWriteError
from pairtrace.store.location import Location

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file grew past the size limit of this file system or shell: raise the limit",
    errno.EROFS: "the file system is read-only: choose another path for the store, or mount it writable",
    errno.EACCES: "permission denied: choose another path for the store, or change the permissions",
    errno.EPERM: "permission denied: choose another path for the store, or change the permissions",
}


@contextmanager
def explain_write_errors(location: Location, action: str, *, resumable: bool = False) -> Iterator[None]:
    """Turn an OSError of the block into a StoreWriteError that names the place and the action.

    Args:
        location: the store.
        action: what was being done, behind "cannot".
        resumable: say that the same command goes on where it stopped.
    """
    try:
        yield
    except OSError as error:
        why = _REASONS.get(error.errno or 0)
        said = str(error) if why is None else f"{why} ({error})"
        safe = "; every finished shard is safe, run the same command again to go on" if resumable else ""
        raise StoreWriteError(f"{location.name}: cannot {action}: {said}{safe}") from error
