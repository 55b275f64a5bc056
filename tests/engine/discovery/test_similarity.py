from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client

from pairtrace.engine.discovery.similarity import COSINE, MARKS, Similarity, similarity_matrix
from pairtrace.errors import ConfigError, DataMismatchError, DirectionError, StoreDamagedError
from pairtrace.store.reader import ActivationStore
from tests.engine.small_store import SmallStore, any_values, make_store, reference_cosine

ITEMS = 40  # more than go through the fused kernel


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    options = {"n_workers": 1, "threads_per_worker": 2, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
    with Client(processes=False, dashboard_address=None, **options) as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_store(tmp_path_factory.mktemp("store"), quarantined=(3,), zero=(70,))


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    values: np.ndarray = any_values(1, ITEMS, 24)
    return values


def computed(path: Path, small: SmallStore, directions: np.ndarray, client: Any, **options: Any) -> Similarity:
    opened = ActivationStore.open(small.path, allow_incomplete=options.pop("allow_incomplete", False))
    return similarity_matrix(path, directions, options.pop("bag", "b"), opened, 5, client)


def matrix_of(found: Similarity) -> np.ndarray:
    values: np.ndarray = zarr.open_group(found.path, mode="r")[COSINE][:]
    return values


def reference(small: SmallStore, directions: np.ndarray) -> np.ndarray:
    return np.stack([reference_cosine(small.rows[5], direction) for direction in directions])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_cosines_and_their_gram_matrix(tmp_path: Path, directions: np.ndarray, client: Any, dtype: str) -> None:
    small = make_store(tmp_path, dtype=dtype, quarantined=(3,), zero=(70,))
    found = computed(tmp_path / "s.zarr", small, directions, client)
    expected = reference(small, directions)
    matrix = matrix_of(found)
    assert matrix.shape == (ITEMS, len(small.status)) and matrix.dtype == np.float16
    np.testing.assert_allclose(matrix, expected, atol=5e-4)
    assert np.flatnonzero(np.isnan(matrix).all(axis=0)).tolist() == [3, 70]
    assert found.columns == len(small.status) - 2
    exact = np.nan_to_num(matrix.astype(np.float64))
    np.testing.assert_allclose(found.gram, exact @ exact.T, rtol=1e-12, atol=1e-12)


def test_a_run_goes_on_with_what_is_left(
    tmp_path: Path, store: SmallStore, directions: np.ndarray, client: Any
) -> None:
    """Columns that are marked done are taken as they are; those without a mark, or lost all the same, are computed."""
    first = computed(tmp_path / "s.zarr", store, directions, client)
    whole = matrix_of(first)
    group = zarr.open_group(first.path, mode="r+")
    group[COSINE][:, 0:64] = np.where(np.isnan(whole[:, 0:64]), np.nan, 0.5)  # marked: stays
    group[COSINE][:, 64:128] = 0.5
    group[MARKS][1] = 0  # an interrupted shard: computed again
    (Path(first.path) / COSINE / "c" / "0" / "2").unlink()  # marked, but lost
    again = computed(tmp_path / "s.zarr", store, directions, client)
    expected = whole.copy()
    expected[:, 0:64][np.isfinite(whole[:, 0:64])] = 0.5
    np.testing.assert_array_equal(matrix_of(again), expected)
    exact = np.nan_to_num(expected.astype(np.float64))
    np.testing.assert_allclose(again.gram, exact @ exact.T, rtol=1e-12, atol=1e-12)
    assert (group[MARKS][:] > 1).all()


def test_the_same_bits_whoever_finishes_first(
    tmp_path: Path, store: SmallStore, directions: np.ndarray, client: Any
) -> None:
    found = [computed(tmp_path / f"{number}.zarr", store, directions, client) for number in range(3)]
    resumed = computed(tmp_path / "0.zarr", store, directions, client)
    for other in (*found[1:], resumed):
        np.testing.assert_array_equal(other.gram, found[0].gram)
        np.testing.assert_array_equal(matrix_of(other), matrix_of(found[0]))


def test_missing_rows_have_no_cosine_until_they_come(tmp_path: Path, directions: np.ndarray, client: Any) -> None:
    """A shard that the store lacks is never marked done."""
    small = make_store(tmp_path, skip_shards=(1,))
    found = computed(tmp_path / "s.zarr", small, directions, client, allow_incomplete=True)
    assert np.isnan(matrix_of(found)[:, 64:128]).all()
    marks = zarr.open_group(found.path, mode="r")[MARKS][:]
    assert marks[1] == 0 and (np.delete(marks, 1) > 1).all()
    assert found.columns == len(small.status) - 64 - 3  # and three that have no direction


@pytest.mark.parametrize("change", ["bag", "items", "store"])
def test_a_matrix_of_something_else_is_refused(
    tmp_path: Path, store: SmallStore, directions: np.ndarray, client: Any, change: str
) -> None:
    computed(tmp_path / "s.zarr", store, directions, client)
    other = replace(store, path=make_store(tmp_path, sources=["x"] * 300).path) if change == "store" else store
    with pytest.raises(DataMismatchError, match=rf"was made with {change}"):
        computed(
            tmp_path / "s.zarr",
            other,
            directions[:9] if change == "items" else directions,
            client,
            bag="other" if change == "bag" else "b",
        )


def test_what_cannot_be_used_is_named(tmp_path: Path, directions: np.ndarray, client: Any) -> None:
    small = make_store(tmp_path)
    with pytest.raises(DirectionError):
        computed(tmp_path / "a.zarr", small, directions * 0, client)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        computed(tmp_path / "file" / "b.zarr", small, directions, client)
    chunk = Path(small.path) / "diff/5/c/2/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreDamagedError, match="shard 2"):
        computed(tmp_path / "c.zarr", small, directions, client)
