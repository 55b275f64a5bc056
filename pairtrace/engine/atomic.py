"""Output files appear complete or not at all, and in a directory that one run alone writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pairtrace.errors import ConfigError
from pairtrace.store.lock import WriterLock


def require_writable(path: str | Path) -> None:
    """Find out before long work that `replacing` could not write a file; nothing is made.

    Raises:
        ConfigError: `path` is a directory, or its place cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a directory; give a file name")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise ConfigError(f"cannot write {path}: {place} is a file, not a directory; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write {path}: no permission to write to {place}; choose another place")


@contextmanager
def one_writer(out: str | Path) -> Iterator[None]:
    """Make the directory of a run, and keep other runs away from it: two would mix their files.

    Raises:
        ConfigError: it cannot be written.
        StoreLockedError: another run is at it.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = WriterLock(Path(out))
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}; choose another --out") from error
    with lock:
        yield


@contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and takes the place of `path`.

    Missing parent directories are made. When the body raises, the temporary file is removed and `path` is as it
    was before.

    Args:
        path: of the file.
        durable: flush it to disk; False spares the wait, and a power cut may cost the file, a killed process does not.

    Raises:
        ConfigError: the file cannot be written (no permission, read-only or full disk, `path` is a directory).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a directory; give a file name")
        yield temporary
        if durable:
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; check the free space and permissions of {path.parent}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
