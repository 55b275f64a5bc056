"""Shards written by processes that do not hold the lock of the store: staged beside their places, committed by the
process that does.

Whoever stages a shard gives its objects names of their own. So two attempts at one shard, a process that was given up
but still runs, or one that was left over from a killed run, never touch each other or a finished shard; and since only
the holder of the lock commits, a shard is always one attempt, whole. What is staged and never committed is removed by
the next writer.

An object store cannot rename. There the arrays are written in their places at once, and only the mark is staged: the
order of arrays and mark holds, but a process left over from a killed run may still write its last shard.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import uuid4

import numpy as np

from pairtrace.errors import StoreError
from pairtrace.store.layout import array_specs
from pairtrace.store.location import PARTIAL, LocalLocation, Location, StorePath, open_location
from pairtrace.store.manifest import Manifest
from pairtrace.store.shard_block import ShardBlock, checked_values, shard_objects
from pairtrace.store.write_errors import explain_write_errors


@dataclass(frozen=True, slots=True)
class StagedShard:
    """A shard that waits to be committed.

    Attributes:
        index: number of the shard.
        attempt: what the names of its objects have in common.
    """

    index: int
    attempt: str


class ShardStager:
    """Stages shards of a store; any number of processes and threads may do so at the same time.

    Args:
        path: of the store, which exists.
        manifest: of the store.
        probe: what the holder of the lock has left in the store. It goes when that run ends or the next one begins.
        fsync: make what is staged durable.
    """

    def __init__(self, path: StorePath, manifest: Manifest, probe: str, *, fsync: bool = True) -> None:
        self._location = open_location(path)
        self._probe = probe
        self._manifest = manifest
        self._specs = array_specs(manifest)
        self._fsync = fsync

    def stage(self, block: ShardBlock) -> StagedShard:
        """Write a shard for `StoreWriter.commit`.

        Raises:
            StoreError: nobody waits for the shard any more.
            StoreWriteError: the disk is full, read-only or forbidden.
        """
        if self._location.size(self._probe) is None:
            raise StoreError(f"{self._location.name}: the run that shard {block.index} belongs to has ended")
        staged = StagedShard(block.index, uuid4().hex[:16])
        values = checked_values(block, self._manifest, self._specs)
        start, stop = self._specs["status"].span(block.index)
        action = f"stage shard {block.index} (rows {start} to {stop - 1})"
        with explain_write_errors(self._location, action, resumable=True):
            objects = shard_objects(block.index, values, self._specs)
            mark = self._specs["status"].key(block.index)
            beside = {mark} if not isinstance(self._location, LocalLocation) else set(objects)
            self._location.write(
                {_staged_key(key, staged.attempt) if key in beside else key: objects[key] for key in objects},
                durable=self._fsync,
            )
        return staged


def place(location: Location, keys: Collection[str], attempt: str, *, durable: bool) -> None:
    """Put staged objects into their places, each at once.

    Raises:
        OSError: one of them is not there, or the place cannot be written.
    """
    for key in keys:
        staged = _staged_key(key, attempt)
        if isinstance(location, LocalLocation):
            (location.root / staged).replace(location.root / key)
            continue
        content = location.read(staged)
        if content is None:
            raise FileNotFoundError(f"{staged} is not there")
        location.write({key: [content]}, durable=durable)
        location.remove(staged, durable=durable)
    if durable and isinstance(location, LocalLocation):
        location.settle({(location.root / key).parent for key in keys})


def leave_probe(path: StorePath) -> str:
    """Write a small object into a store, to show other processes that it is the same one; returns its key.

    Raises:
        StoreWriteError: the place cannot be written.
    """
    location, key = open_location(path), f"status/.probe-{uuid4().hex}{PARTIAL}"
    with explain_write_errors(location, "write into the store"):
        location.write({key: [np.zeros(1, np.uint8)]}, durable=True)
    return key


def sees_probe(path: StorePath, key: str) -> bool:
    """Whether the store at a path has the probe that another process left in the store that it means."""
    return open_location(path).size(key) is not None


def _staged_key(key: str, attempt: str) -> str:
    return f"{key}.{attempt}{PARTIAL}"
