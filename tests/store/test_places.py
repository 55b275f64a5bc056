from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairtrace.errors import (
    StoreLockedError,
    StoreWriteError,
)
from pairtrace.store import metadata
from pairtrace.store.location import LocalLocation
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import StoreWriter
from tests.store.samples import make_block, make_manifest, write_store

# One writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        with pytest.raises(StoreLockedError, match=f"process {os.getpid()}"):
            StoreWriter.create_or_resume(tmp_path, manifest)
        writer.write_shard(make_block(manifest, 0))
    StoreWriter.create_or_resume(tmp_path, manifest).close()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    manifest = make_manifest()
    StoreWriter.create_or_resume(tmp_path, manifest).close()
    code = (
        "import sys, time; from pathlib import Path; from pairtrace.store.lock import WriterLock;"
        "lock = WriterLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreLockedError, match=f"process {other.pid}"):
            StoreWriter.create_or_resume(tmp_path, manifest)
        other.send_signal(signal.SIGKILL)
        other.wait()
        StoreWriter.create_or_resume(tmp_path, manifest).close()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        write_store(tmp_path, make_manifest())
    assert "only one writer" in caplog.text
    ActivationStore.open(tmp_path)


def test_readers_are_not_locked_out(tmp_path: Path) -> None:
    manifest = make_manifest()
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        writer.write_shard(make_block(manifest, 0))
        writer.flush()
        assert ActivationStore.open(tmp_path, allow_incomplete=True).status()[:4].all()


# Places that cannot be written


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_operating_system_errors_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Injected: the tests may run as root, whom permissions do not stop."""
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        monkeypatch.setattr(LocalLocation, "write", fail)
        writer.write_shard(make_block(manifest, 1))
        with pytest.raises(StoreWriteError, match=words) as caught:
            writer.flush()
    message = str(caught.value)
    assert message.count(os.strerror(number)) == 1
    assert str(tmp_path) in message and "shard 1 (rows 4 to 7)" in message and "run the same command again" in message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_where_nothing_can_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(metadata, "create_arrays", fail)
    with pytest.raises(StoreWriteError, match="cannot create or open the store"):
        StoreWriter.create_or_resume(tmp_path / "a", make_manifest())
    monkeypatch.undo()
    write_store(tmp_path / "a", make_manifest())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreWriteError, match="permission denied"):
        StoreWriter.create_or_resume(tmp_path / "a", make_manifest())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("key", ["diff/5/c/1/0", "status/c/1"])
def test_a_full_disk(tmp_path: Path, key: str) -> None:
    """The kernel's own ENOSPC, from /dev/full in the place of the half-written file."""
    manifest = make_manifest()
    write_store(tmp_path, manifest, [0])
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        target = tmp_path / f"{key}.partial"
        target.parent.mkdir(exist_ok=True)
        target.symlink_to("/dev/full")
        writer.write_shard(make_block(manifest, 1))
        with pytest.raises(StoreWriteError, match=r"disk is full.*shard is safe"):
            writer.flush()
        assert writer.missing_shards() == [1, 2]
        assert not list(tmp_path.rglob("*.partial"))
        writer.write_shard(make_block(manifest, 1))
        assert writer.missing_shards() == [2]


def test_an_error_comes_out_once_and_spares_the_other_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised by the next call that waits, at the latest by the end of the block."""
    manifest = make_manifest(rows=40)
    write_one = LocalLocation.write

    def fail(self: LocalLocation, objects: Any, *, durable: bool) -> None:
        if any(key.endswith("diff/5/c/2/0") for key in objects):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_one(self, objects, durable=durable)

    monkeypatch.setattr(LocalLocation, "write", fail)
    with pytest.raises(StoreWriteError, match=r"shard 2 \(rows 8 to 11\)"):
        write_store(tmp_path / "ends", manifest, [1, 2, 3])
    with StoreWriter.create_or_resume(tmp_path / "goes on", manifest, fsync=False) as writer:
        for shard in (1, 2, 3):
            writer.write_shard(make_block(manifest, shard))
        with pytest.raises(StoreWriteError, match="shard 2"):
            for shard in range(4, 10):
                writer.write_shard(make_block(manifest, shard))
        monkeypatch.undo()
        assert 2 in writer.missing_shards() and not {1, 3} & set(writer.missing_shards())
    with (
        pytest.raises(ZeroDivisionError),
        StoreWriter.create_or_resume(tmp_path / "other", manifest, fsync=False) as writer,
    ):
        monkeypatch.setattr(LocalLocation, "write", fail)
        writer.write_shard(make_block(manifest, 2))
        raise ZeroDivisionError
    monkeypatch.undo()
    for name in ("ends", "goes on", "other"):
        write_store(tmp_path / name, manifest)
        assert ActivationStore.open(tmp_path / name).rows == 40


def test_a_file_size_limit(tmp_path: Path) -> None:
    """The kernel's own EFBIG: half of the chunk is written when it strikes."""
    manifest = make_manifest(width=20_000, rows=8)
    with StoreWriter.create_or_resume(tmp_path, manifest) as writer:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            writer.write_shard(make_block(manifest, 0))
            with pytest.raises(StoreWriteError, match="size limit"):
                writer.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert writer.missing_shards() == [0, 1]
    assert not list(tmp_path.rglob("*.partial"))
