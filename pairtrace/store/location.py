"""Where a store lives: a local directory, or an object store that Zarr can open (s3://, gs://, memory://).

Both kinds give the same few operations on whole objects, named by their key inside the store.
A local object is replaced at once (written beside its place, made durable, then renamed) and read by mapping.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar
from urllib.parse import unquote, urlparse

import numpy as np
import numpy.typing as npt

from pairtrace.errors import MissingDependencyError, StoreError

if TYPE_CHECKING:
    import zarr
    from zarr.abc.store import Store

StorePath = str | os.PathLike[str]
RawBytes = npt.NDArray[np.uint8]

PARTIAL = ".partial"

_Item = TypeVar("_Item")

# Files that are written and made durable at the same time.
_AT_ONCE = 8

# Linux reads no more than its read-ahead window (128 KiB to some MiB) for one request, and drops the rest.
_PREFETCH_BYTES = 512 << 10
_CACHE_SAMPLES = 4


class Location(Protocol):
    """Whole-object access to one store."""

    @property
    def name(self) -> str:
        """The store's path or address, for messages."""

    def read(self, key: str, *, mapped: bool = True) -> RawBytes | None:
        """The bytes of an object, read-only, or None when there is no such object.

        Args:
            key: of the object.
            mapped: map a local file, where that is possible, instead of copying it.
        """

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when there is no such object."""

    def write(self, objects: Mapping[str, Sequence[RawBytes]], *, durable: bool) -> None:
        """Create or replace objects; on return they are complete and, if `durable`, will outlive a power cut.

        An object is its pieces, one after the other. Each object is replaced at once, in no fixed order.
        """

    def remove(self, key: str, *, durable: bool) -> None:
        """Remove an object if it is there."""

    def list_keys(self) -> list[str]:
        """Keys of all objects of the store, sorted."""

    def open_group(self, mode: str) -> zarr.Group:
        """The store as a Zarr group (mode "r", "r+" or "a")."""


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class LocalLocation:
    """A store in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._settled: set[Path] = set()

    @property
    def name(self) -> str:
        """The directory."""
        return str(self.root)

    def is_directory(self) -> bool:
        """Whether there is a directory at all.

        Raises:
            StoreError: it cannot be told, for want of permission.
        """
        with _explain_read_errors(self.name):
            return self.root.is_dir()

    def read(self, key: str, *, mapped: bool = True) -> RawBytes | None:
        """Map an object, so that nothing is read until it is looked at, or copy it."""
        path = os.path.join(self.root, key)  # noqa: PTH118 - a pathlib.Path takes longer than opening the file
        try:
            with _opened(path) as handle:
                size = os.fstat(handle).st_size
                if size == 0:  # an empty file cannot be mapped
                    return np.empty(0, np.uint8)
                if not mapped:
                    return _copied(handle, size)
                # Not numpy.memmap, which takes ten times as long for a small file.
                return np.frombuffer(mmap.mmap(handle, size, access=mmap.ACCESS_READ), np.uint8)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error

    def copy_parts(self, key: str, size: int, parts: Iterable[tuple[int, memoryview]]) -> int | None:
        """Copy parts of an object of known size, without mapping it.

        Args:
            key: of the object.
            size: bytes that the object should have; if it has others, nothing is copied.
            parts: first byte of each part, and where its bytes go.

        Returns:
            bytes of the object; None when there is no such object.
        """
        path = os.path.join(self.root, key)  # noqa: PTH118 - a pathlib.Path takes longer than opening the file
        with _explain_read_errors(path):
            try:
                with _opened(path) as handle:
                    actual = os.fstat(handle).st_size
                    if actual == size:
                        for start, target in parts:
                            if os.preadv(handle, [target], start) != len(target):
                                return os.fstat(handle).st_size
                    return actual
            except (FileNotFoundError, NotADirectoryError):
                return None

    def is_cached(self, key: str) -> bool:
        """Whether the page cache seems to hold an object: it does at a few places, which is quickly told."""
        if not hasattr(os, "RWF_NOWAIT"):  # not on this system
            return False
        try:
            with _opened(self.root / key) as handle:
                size = os.fstat(handle).st_size
                for place in range(_CACHE_SAMPLES):
                    os.preadv(handle, [bytearray(1)], size * place // _CACHE_SAMPLES, os.RWF_NOWAIT)
        except OSError:  # it would have to wait for the disk, or the file system cannot tell
            return False
        return True

    def prefetch(self, key: str) -> None:
        """Ask for the pages of an object that are not in the page cache; never fails, may wait for the disk's queue."""
        if not hasattr(os, "posix_fadvise"):  # not on this system
            return
        with suppress(OSError), _opened(self.root / key) as handle:
            for start in range(0, os.fstat(handle).st_size, _PREFETCH_BYTES):
                os.posix_fadvise(handle, start, _PREFETCH_BYTES, os.POSIX_FADV_WILLNEED)

    def size(self, key: str) -> int | None:
        """Bytes of an object."""
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self.root / key} cannot be read: {error}") from error

    def write(self, objects: Mapping[str, Sequence[RawBytes]], *, durable: bool) -> None:
        """Write beside, make durable, rename: a reader or a crash sees the old object or the new one.

        Each of these steps is done for all objects together and at once: the disk is kept busy, and what the file
        system has to commit to its journal it commits for all of them in one go.
        """
        paths = {key: self.root / key for key in objects}
        partials = {key: path.with_name(path.name + PARTIAL) for key, path in paths.items()}

        def write_one(key: str) -> None:
            paths[key].parent.mkdir(parents=True, exist_ok=True)
            with partials[key].open("wb") as file:
                for piece in objects[key]:
                    file.write(piece.data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())

        try:
            _all_at_once(write_one, list(objects))
            for key, path in paths.items():
                partials[key].replace(path)
        except OSError:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
            raise
        if durable:
            self.settle({path.parent for path in paths.values()})

    def remove(self, key: str, *, durable: bool) -> None:
        """Remove a file."""
        path = self.root / key
        if path.exists():
            path.unlink()
            if durable:
                fsync_path(path.parent)

    def list_keys(self) -> list[str]:
        """Paths of all files below the directory."""
        found = (Path(folder) / file for folder, _, files in os.walk(self.root) for file in files)
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def open_group(self, mode: str) -> zarr.Group:
        """The directory as a Zarr group."""
        import zarr

        return zarr.open_group(self.root, mode=mode, zarr_format=3)  # type: ignore[arg-type]

    def settle(self, folders: set[Path]) -> None:
        """Make the entries of directories durable, and the directories themselves ("c/7" in "c", and so on up).

        What led to a directory that this object has settled once is not looked at again.
        """
        wanted = set(folders)
        for folder in folders:
            child = folder
            while child != self.root and child not in self._settled:
                wanted.add(child.parent)
                child = child.parent
        _all_at_once(fsync_path, list(wanted))
        self._settled |= wanted


def _all_at_once(action: Callable[[_Item], None], items: list[_Item]) -> None:
    if len(items) == 1:
        action(items[0])
        return
    with ThreadPoolExecutor(min(len(items), _AT_ONCE), thread_name_prefix="pairtrace-disk") as pool:
        for _ in pool.map(action, items):
            pass


class RemoteLocation:
    """A store behind any Zarr store; objects there are replaced at once and durable when written."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._stores: dict[bool, Store] = {}

    @property
    def name(self) -> str:
        """The address."""
        return self.address

    def read(self, key: str, *, mapped: bool = True) -> RawBytes | None:
        """Fetch an object."""
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        store = self._open_store(read_only=True)
        with _explain_read_errors(f"{self.address}: {key}"):
            buffer = sync(store.get(key, default_buffer_prototype()))
        return None if buffer is None else np.frombuffer(buffer.to_bytes(), np.uint8)

    def size(self, key: str) -> int | None:
        """Bytes of an object."""
        from zarr.core.sync import sync

        store = self._open_store(read_only=True)
        with _explain_read_errors(f"{self.address}: {key}"):
            try:
                return sync(store.getsize(key))
            except FileNotFoundError:
                return None

    def write(self, objects: Mapping[str, Sequence[RawBytes]], *, durable: bool) -> None:
        """Put objects."""
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        store, kind = self._open_store(read_only=False), default_buffer_prototype().buffer
        for key, pieces in objects.items():
            sync(store.set(key, kind.from_bytes(b"".join(piece.tobytes() for piece in pieces))))

    def remove(self, key: str, *, durable: bool) -> None:
        """Delete an object."""
        from zarr.core.sync import sync

        sync(self._open_store(read_only=False).delete(key))

    def list_keys(self) -> list[str]:
        """Keys of all objects under the address."""
        from zarr.core.sync import sync

        async def listed() -> list[str]:
            return sorted([key async for key in store.list()])

        store = self._open_store(read_only=True)
        with _explain_read_errors(self.address):
            return sync(listed())

    def open_group(self, mode: str) -> zarr.Group:
        """The address as a Zarr group."""
        import zarr

        store = self._open_store(read_only=mode == "r")
        return zarr.open_group(store, mode=mode, zarr_format=3)  # type: ignore[arg-type]

    def _open_store(self, *, read_only: bool) -> Store:
        from zarr.storage import FsspecStore

        if read_only not in self._stores:
            try:
                self._stores[read_only] = FsspecStore.from_url(self.address, read_only=read_only)
            except ImportError as error:
                raise MissingDependencyError(
                    _packages_in(str(error)), None, f"the store address {self.address!r}"
                ) from error
            except ValueError as error:
                raise StoreError(f"{self.address!r} is not an address that can be opened: {error}") from error
        return self._stores[read_only]


def open_location(path: StorePath) -> LocalLocation | RemoteLocation:
    """The location that a path (`~` is the home directory) or address names; nothing is opened or created yet.

    Raises:
        StoreError: `~name` names an unknown user.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return LocalLocation(Path(unquote(urlparse(text).path)))
    if "://" in text:
        return RemoteLocation(text)
    if not text.startswith("~"):  # a Path drops the dot of "./~name"
        return LocalLocation(Path(text))
    try:
        return LocalLocation(Path(text).expanduser())
    except RuntimeError as error:
        raise StoreError(f"{text}: {error}; write ./{text} if the path begins with this very name") from error


@contextmanager
def _opened(path: StorePath) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _copied(handle: int, size: int) -> RawBytes:
    """The first `size` bytes of a file, or fewer if it has become shorter meanwhile."""
    raw = np.empty(size, np.uint8)
    done = 0
    while done < size:
        count = os.preadv(handle, [raw[done:].data], done)
        if count == 0:
            break
        done += count
    return raw[:done]


@contextmanager
def _explain_read_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what} cannot be read: {error}") from error


def _packages_in(message: str) -> str:
    """The packages that fsspec asks for, for example in "Install s3fs to access S3", separated by spaces."""
    quoted = re.findall(r'"([\w.-]+)"', message)
    named = quoted or re.findall(r"[Ii]nstall (?:the )?([\w.-]+)", message)
    return " ".join(named) or "fsspec"
