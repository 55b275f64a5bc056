from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from pairtrace.errors import MissingDependencyError, StoreError
from pairtrace.store.location import LocalLocation, RemoteLocation, open_location
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.store.samples import make_manifest, write_store


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_store("~/acts.zarr", make_manifest())
    assert ActivationStore.open(tmp_path / "acts.zarr").path == str(tmp_path / "acts.zarr")
    assert ActivationStore.open("~/acts.zarr").rows == 10 and verify("~/acts.zarr").ok
    assert not (tmp_path / "~").exists()


def test_a_home_that_is_not_known() -> None:
    with pytest.raises(StoreError, match=r"~nobody-has-this-name/acts.*write \./~nobody"):
        open_location("~nobody-has-this-name/acts")
    location = open_location("./~nobody-has-this-name/acts")
    assert isinstance(location, LocalLocation) and location.root.parts[0] == "~nobody-has-this-name"


@pytest.mark.parametrize(
    ("address", "module", "command"),
    [
        ("s3://bucket/acts.zarr", "s3fs", "pip install s3fs"),
        ("gs://bucket/acts.zarr", "gcsfs", "pip install gcsfs"),
        ("abfs://bucket/acts.zarr", "adlfs", "pip install adlfs"),
        ("http://host/acts.zarr", "aiohttp", "pip install requests aiohttp"),
        ("sftp://host/acts.zarr", "paramiko", "pip install paramiko"),
        ("github://a:b@main/acts.zarr", "requests", "pip install requests"),
    ],
)
def test_an_address_whose_package_is_missing(
    address: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, module, None)
    protocol = address.partition(":")[0]
    # A kind of file system that was loaded before is not looked for again.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.delitem(sys.modules, f"fsspec.implementations.{protocol}", raising=False)
    for use in (ActivationStore.open, verify, lambda path: StoreWriter.create_or_resume(path, make_manifest())):
        with pytest.raises(MissingDependencyError) as caught:
            use(address)
        assert str(caught.value).endswith(f"install it with: {command}")
        assert address in str(caught.value) and "pairtrace[" not in str(caught.value)


def test_an_address_of_no_known_kind() -> None:
    for use in (ActivationStore.open, lambda path: StoreWriter.create_or_resume(path, make_manifest())):
        with pytest.raises(StoreError, match=r"foo://bucket/acts\.zarr.*foo"):
            use("foo://bucket/acts.zarr")


@pytest.mark.parametrize("use", ["open", "verify", "write"])
def test_a_directory_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """Injected: the tests may run as root, whom permissions do not stop."""
    root = tmp_path / "closed" / "acts.zarr"
    write_store(root, make_manifest())
    original = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if root.parent in self.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    uses = {
        "open": ActivationStore.open,
        "verify": verify,
        "write": lambda path: StoreWriter.create_or_resume(path, make_manifest()),
    }
    with pytest.raises(StoreError, match=r"acts\.zarr.*[Pp]ermission denied"):
        uses[use](root)


def test_an_object_store_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from zarr.storage import FsspecStore

    async def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    for name in ("get", "getsize"):
        monkeypatch.setattr(FsspecStore, name, refuse)
    location = RemoteLocation("memory://closed/acts.zarr")
    for read in (location.read, location.size):
        with pytest.raises(StoreError, match=r"memory://closed/acts\.zarr: zarr\.json cannot be read: Access Denied"):
            read("zarr.json")
