from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from pairtrace.errors import ConfigError, LayerError, MissingDependencyError, StoreDamagedError, StoreError
from pairtrace.store import dask_view
from pairtrace.store.reader import ActivationStore
from tests.store.samples import expected_arrays, make_manifest, to_float, write_store

DTYPES = ["bfloat16", "float16", "float32", "int8"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["none", "zstd:1"])
def test_chunks_are_the_shards(tmp_path: Path, dtype: str, codec: str) -> None:
    manifest = make_manifest(dtype=dtype, codec=codec, sides=True)
    write_store(tmp_path / "acts.zarr", manifest)
    store = ActivationStore.open(tmp_path / "acts.zarr")
    for array in ("diff", "chosen"):
        rows = store.dask(5, array)
        assert rows.chunks == ((4, 4, 2), (6,))
        assert rows.dtype == (np.float16 if dtype == "float16" else np.float32)
        computed = rows.compute()
        assert computed.dtype == rows.dtype
        if dtype == "int8":
            expected = store.take(5, np.arange(10), array)
        else:
            expected = to_float(expected_arrays(manifest)[f"{array}/5"], dtype)
        np.testing.assert_array_equal(computed.astype(np.float32), expected)
        np.testing.assert_array_equal(rows[3:9, 1].compute(), computed[3:9, 1])


def test_an_object_store_gives_the_same(tmp_path: Path) -> None:
    address = f"memory://{tmp_path.name}/acts.zarr"
    write_store(address, make_manifest())
    rows = ActivationStore.open(address).dask(2).compute()
    np.testing.assert_array_equal(rows, expected_arrays(make_manifest())["diff/2"])


def test_tasks_carry_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "acts.zarr", make_manifest(width=5000, rows=40))
    monkeypatch.chdir(tmp_path)
    rows = ActivationStore.open("acts.zarr").dask(2)
    assert len(pickle.dumps(rows)) < 20_000
    monkeypatch.chdir("/")  # a worker has another working directory
    assert rows.compute().shape == (40, 5000)


def test_names_depend_on_the_store(tmp_path: Path) -> None:
    for name, limit in (("a", None), ("b", 10)):
        write_store(tmp_path / name, make_manifest(limit=limit))
    first, second = (ActivationStore.open(tmp_path / name) for name in ("a", "b"))
    assert first.dask(2).name == first.dask(2).name
    assert len({first.dask(2).name, first.dask(5).name, second.dask(2).name}) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_rows_are_nan(tmp_path: Path, dtype: str) -> None:
    write_store(tmp_path, make_manifest(dtype=dtype), [0, 2])
    store = ActivationStore.open(tmp_path, allow_incomplete=True)
    rows = store.dask(5).compute()
    assert np.isnan(rows[4:8]).all() and np.isfinite(rows[:4]).all() and np.isfinite(rows[8:]).all()


def test_what_is_not_in_the_store(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest())
    store = ActivationStore.open(tmp_path)
    with pytest.raises(LayerError, match="layer 3"):
        store.dask(3)
    with pytest.raises(ConfigError, match="--sides"):
        store.dask(2, "chosen")


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink, flip])
def test_a_damaged_shard_is_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    write_store(tmp_path, make_manifest())
    rows = ActivationStore.open(tmp_path).dask(5)
    harm(tmp_path / "diff/5/c/1/0")
    np.testing.assert_array_equal(rows[:4].compute(), expected_arrays(make_manifest())["diff/5"][:4])
    with pytest.raises(StoreDamagedError, match=r"array diff/5, shard 1 \(rows 4 to 7\)"):
        rows.compute()


def test_without_checksums_only_the_length_is_compared(tmp_path: Path) -> None:
    write_store(tmp_path, make_manifest())
    flip(tmp_path / "diff/5/c/1/0")
    store = ActivationStore.open(tmp_path)
    assert store.dask(5, checksum=False).compute().shape == (10, 6)


def test_another_store_under_the_same_path_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "a", make_manifest())
    rows = ActivationStore.open(tmp_path / "a").dask(5)
    (tmp_path / "a").rename(tmp_path / "old")
    write_store(tmp_path / "a", make_manifest(data_fingerprint="e" * 64))
    dask_view.open_rows.cache_clear()
    with pytest.raises(StoreError, match="is another store"):
        rows.compute()


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, make_manifest())
    store = ActivationStore.open(tmp_path)
    honest = builtins.__import__

    def without_dask(name: str, *args: Any) -> Any:
        if name.startswith("dask"):
            raise ImportError(name)
        return honest(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_dask)
    with pytest.raises(MissingDependencyError, match=r"Dask view of a store needs .*pairtrace\[discover\]"):
        store.dask(5)
