"""The crash-safe shard writer.

A shard's arrays are written and made durable first; then its status chunk, which is the mark. A crash at any
instant costs at most the shards in flight: what has no mark is computed again, what has one is complete.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

from pairtrace.errors import StoreDamagedError, StoreMismatchError, StoreWriteError
from pairtrace.store.chunks import read_chunk
from pairtrace.store.layout import MISSING, array_specs
from pairtrace.store.location import LocalLocation, Location, StorePath, open_location
from pairtrace.store.lock import WriterLock
from pairtrace.store.manifest import Manifest
from pairtrace.store.metadata import (
    check_arrays,
    create_store,
    discard_unmarked,
    read_manifest,
    refuse_foreign_directory,
    remove_partial_files,
)
from pairtrace.store.shard_block import ShardBlock, Values, checked_values, shard_objects
from pairtrace.store.staging import StagedShard, place
from pairtrace.store.write_errors import explain_write_errors

__all__ = ["ShardBlock", "StoreWriter"]

logger = logging.getLogger(__name__)

# Shards that are written at the same time: while one waits for the disk to say that it is safe, the others' bytes are
# on their way.
IN_FLIGHT = 6


class StoreWriter:
    """Writes the shards of one store, in the background; made by `create_or_resume`, used as a context manager.

    A local store is locked against a second writer until `close` or the end of the process. An object store
    has no lock: start one writer only.

    Attributes:
        manifest: the store's own manifest; a resumed store keeps its `shard_rows`.
        created: whether this run created the store.
    """

    def __init__(
        self, location: Location, manifest: Manifest, lock: WriterLock | None, *, fsync: bool, created: bool
    ) -> None:
        self.manifest = manifest
        self.created = created
        self._location = location
        self._specs = array_specs(manifest)
        self._lock = lock
        self._fsync = fsync
        self._closed = False
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pairtrace-shard")
        self._pending: deque[Future[None]] = deque()

    @classmethod
    def create_or_resume(cls, path: StorePath, manifest: Manifest, fsync: bool = True) -> StoreWriter:
        """Create an empty store, or open an existing one of the same identity to compute what is missing.

        A local store of another identity in which no shard is finished yet is created anew.

        Args:
            path: directory, or address of an object store.
            manifest: what this run computes.
            fsync: make every shard durable before its mark. False trades that for speed: a killed process
                still loses nothing, a power cut may.

        Raises:
            StoreMismatchError: the store was made from something else, and holds some of it.
            StoreSchemaError: the store has another schema version.
            StoreDamagedError: the store's metadata is damaged.
            StoreLockedError: another process is writing.
            StoreWriteError: the place is full, read-only or forbidden.
            StoreError: something that is not a store is in the way.
        """
        location = open_location(path)
        lock = None
        with ExitStack() as undo, explain_write_errors(location, "create or open the store"):
            if isinstance(location, LocalLocation):
                refuse_foreign_directory(location)
                lock = WriterLock(location.root)
                undo.callback(lock.release)
            existing = _manifest_if_readable(location)
            if existing is None or _gives_way(location, existing, manifest, durable=fsync):
                create_store(location, manifest, durable=fsync)
                writer = cls(location, manifest, lock, fsync=fsync, created=True)
            else:
                check_arrays(location, existing)
                if isinstance(location, LocalLocation):
                    remove_partial_files(location)
                writer = cls(location, existing, lock, fsync=fsync, created=False)
            undo.pop_all()  # the writer has the lock now
            return writer

    def missing_shards(self) -> list[int]:
        """Numbers of the shards to compute: without a mark, or marked but visibly damaged.

        A damaged mark, and a marked shard with a missing chunk or one of the wrong length, are computed again
        (and logged). A flipped bit, and the length of a compressed chunk, are left to `verify`, which reads everything.
        """
        self.flush()
        return [shard for shard in range(self._specs["status"].shards) if not self._is_complete(shard)]

    def write_shard(self, block: ShardBlock) -> None:
        """Write one shard in the background: all its arrays, then its mark.

        The block is checked here and must not be changed until `flush` or `close`. When several shards are under way
        already, this waits for the first of them.

        Raises:
            StoreWriteError: the disk is full, read-only or forbidden; the shard that the message names has no mark
                then. It may be an earlier one than this.
        """
        assert not self._closed, "the writer is closed"
        values = checked_values(block, self.manifest, self._specs)
        self._wait(IN_FLIGHT - 1)
        self._pending.append(self._pool.submit(self._write, block.index, values))

    def unmark(self, shards: Iterable[int]) -> None:
        """Take the marks of shards that are damaged, before other processes write them again.

        Raises:
            StoreWriteError: as for `write_shard`.
        """
        status = self._specs["status"]
        for shard in shards:
            with explain_write_errors(self._location, f"remove the mark of shard {shard}", resumable=True):
                self._location.remove(status.key(shard), durable=self._fsync)

    def commit(self, staged: StagedShard) -> None:
        """Put a shard that another process has staged into its place: all its arrays, then its mark.

        Raises:
            StoreWriteError: a staged object is not there, or as for `write_shard`; the shard has no mark then.
        """
        assert not self._closed, "the writer is closed"
        status = self._specs["status"].key(staged.index)
        arrays = [spec.key(staged.index) for name, spec in self._specs.items() if name != "status"]
        with explain_write_errors(self._location, f"commit shard {staged.index}", resumable=True):
            self._location.remove(status, durable=self._fsync)
            # In an object store they are there already: it cannot rename.
            if isinstance(self._location, LocalLocation):
                place(self._location, arrays, staged.attempt, durable=self._fsync)
            place(self._location, [status], staged.attempt, durable=self._fsync)

    def discard_staged(self) -> None:
        """Remove what was staged and will not be committed."""
        self.flush()
        with explain_write_errors(self._location, "remove what was staged"):
            remove_partial_files(self._location)

    def flush(self) -> None:
        """Wait until every shard so far is written and marked.

        Raises:
            StoreWriteError: see `write_shard`.
        """
        self._wait(0)

    def close(self) -> None:
        """`flush`, then let go of the lock.

        Raises:
            StoreWriteError: see `write_shard`.
        """
        try:
            self.flush()
        finally:
            self._closed = True
            self._pool.shutdown()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreWriteError:
            if error is None:
                raise
            logger.warning("%s: a shard was not written either", self._location.name, exc_info=True)

    def _wait(self, under_way: int) -> None:
        """Wait until at most so many shards are under way; raises the error of the first that failed."""
        while len(self._pending) > under_way:
            self._pending.popleft().result()

    def _write(self, shard: int, values: dict[str, Values]) -> None:
        status = self._specs["status"]
        start, stop = status.span(shard)
        with explain_write_errors(self._location, f"write shard {shard} (rows {start} to {stop - 1})", resumable=True):
            # A damaged shard that is written again must not keep its mark meanwhile.
            self._location.remove(status.key(shard), durable=self._fsync)
            mark = {"status": values.pop("status")}
            self._put(shard, values)
            self._put(shard, mark)

    def _put(self, shard: int, values: Mapping[str, Values]) -> None:
        self._location.write(shard_objects(shard, values, self._specs), durable=self._fsync)

    def _is_complete(self, shard: int) -> bool:
        status = self._specs["status"]
        if self._location.size(status.key(shard)) is None:
            return False
        try:
            if (read_chunk(self._location, status, shard) == MISSING).any():
                raise StoreDamagedError("its mark holds rows without a status")
            for spec in self._specs.values():
                size = self._location.size(spec.key(shard))
                if size is None or spec.chunk_bytes not in (None, size):
                    raise StoreDamagedError(f"the chunk of {spec.name} is missing or has the wrong length")
        except StoreDamagedError as error:
            logger.warning("%s: shard %d is computed again: %s", self._location.name, shard, error)
            return False
        return True


def _manifest_if_readable(location: Location) -> Manifest | None:
    """The manifest; None also for a root that a power cut left unreadable, which `create_store` examines."""
    if isinstance(location, LocalLocation) and location.size("zarr.json") == 0:
        return None
    return read_manifest(location)


def _gives_way(location: Location, existing: Manifest, manifest: Manifest, *, durable: bool) -> bool:
    """Whether a store of another identity was empty and is cleared away (local only, where the lock protects it).

    Raises:
        StoreMismatchError: it has another identity and is not empty.
    """
    try:
        existing.require_same(manifest)
    except StoreMismatchError as error:
        if not isinstance(location, LocalLocation) or not discard_unmarked(location, existing, durable=durable):
            raise
        logger.warning(
            "%s was begun with another %s but holds no finished shard: it is begun anew", location.name, error.field
        )
        return True
    return False
