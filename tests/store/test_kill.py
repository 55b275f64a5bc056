"""kill -9 at random instants: what is marked is whole, and the resumed store has the bytes of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pairtrace.store.writer import StoreWriter
from tests.store.crashes import assert_marked_shards_are_whole
from tests.store.samples import make_block, make_manifest, shard_count, tree_bytes, write_store

# Many more shards than are written at the same time: kills shall strike after different numbers of them.
MANIFEST = make_manifest(rows=290, sides=True)
# A forked child starts in milliseconds; the server it is forked from is a fresh process without threads.
CONTEXT = multiprocessing.get_context("forkserver")


def write_all(root: Path, fsync: bool, parent: Connection) -> None:
    blocks = [make_block(MANIFEST, shard) for shard in range(shard_count(MANIFEST))]
    parent.send("started")
    with StoreWriter.create_or_resume(root, MANIFEST, fsync=fsync) as writer:
        parent.send("opened")
        for shard in writer.missing_shards():
            writer.write_shard(blocks[shard])


def run(root: Path, fsync: bool, moment: str, kill_after: float | None) -> tuple[float, int]:
    """Seconds that the child lived after `moment`, and its exit code."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=write_all, args=(root, fsync, theirs))
    child.start()
    while ours.recv() != moment:
        pass
    begin = time.perf_counter()
    child.join(kill_after)
    lived = time.perf_counter() - begin
    child.kill()
    child.join()
    assert child.exitcode is not None
    return lived, child.exitcode


@pytest.mark.parametrize(("fsync", "kills"), [(False, 20), (True, 10)])
def test_kill_and_resume(tmp_path: Path, fsync: bool, kills: int) -> None:
    """Every fourth kill strikes while the store is created or opened, the others while shards are written."""
    CONTEXT.set_forkserver_preload(["tests.store.test_kill", "zarr", "numcodecs", "google_crc32c"])
    write_store(tmp_path / "reference", MANIFEST)
    reference = tree_bytes(tmp_path / "reference")
    lived = {}
    for moment in ("started", "opened"):
        lived[moment], code = run(tmp_path / moment, fsync, moment, None)
        assert code == 0 and tree_bytes(tmp_path / moment) == reference
    delays = {"started": lived["started"] - lived["opened"], "opened": 0.5 * lived["opened"]}
    random_ = random.Random(7)
    killed, finished, progress = 0, 0, set()
    while killed < kills:
        assert finished < 3 * kills, "the child is faster than its killer"
        root = tmp_path / f"store-{finished}"  # killed again and again until it is complete
        moment = "started" if killed % 4 == 0 else "opened"
        code = run(root, fsync, moment, random_.uniform(0, max(delays[moment], 0.001)))[1]
        if code == 0:
            assert tree_bytes(root) == reference
            finished += 1
            continue
        killed += 1
        progress.add(len(assert_marked_shards_are_whole(root, MANIFEST, reference)))
    assert len(progress) > 2, f"the kills struck after {sorted(progress)} finished shards only"
    write_store(root, MANIFEST)
    assert tree_bytes(root) == reference
