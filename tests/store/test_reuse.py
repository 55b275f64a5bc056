from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtrace.errors import StoreMismatchError
from pairtrace.store.reader import ActivationStore
from pairtrace.store.reuse import PairIndex, compatible
from pairtrace.store.writer import StoreWriter
from tests.store.samples import make_block, make_manifest, write_store
from tests.store.test_manifest import OTHER


class FakeStore:
    """Only what the index reads."""

    def __init__(self, ids: np.ndarray, status: np.ndarray) -> None:
        self.ids, self.states = ids, status

    def pair_ids(self) -> np.ndarray:
        return self.ids

    def status(self) -> np.ndarray:
        return self.states


def index_of(*stores: FakeStore) -> PairIndex:
    return PairIndex(stores)  # type: ignore[arg-type]


def by_dict(stores: list[FakeStore], wanted: np.ndarray) -> list[tuple[int, int]]:
    where: dict[bytes, tuple[int, int]] = {}
    for number, store in enumerate(stores):
        for row, (identity, status) in enumerate(zip(store.ids, store.states, strict=True)):
            if status == 1:
                where.setdefault(identity.tobytes(), (number, row))
    return [where.get(identity.tobytes(), (-1, -1)) for identity in wanted]


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), max_size=4), letters=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_against_a_dict(sizes: list[int], letters: int, seed: int) -> None:
    """Few different bytes at few places, so that whole ids and halves of ids coincide again and again."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        values = np.zeros((n, 16), np.uint8)
        values[:, [0, 7, 8, 15]] = rng.integers(0, letters, (n, 4)) * 255
        return values

    stores = [FakeStore(ids(n), rng.integers(0, 3, n).astype(np.uint8)) for n in sizes]
    wanted = ids(30)
    owner, row = index_of(*stores).find(wanted)
    assert (owner.dtype, row.dtype) == (np.int32, np.int64)
    expected = by_dict(stores, wanted)
    assert list(zip(owner.tolist(), row.tolist(), strict=True)) == expected


def test_an_index_that_compares_half_an_id_is_caught() -> None:
    ids = np.zeros((3, 16), np.uint8)
    ids[:, 15] = [1, 2, 3]
    index = index_of(FakeStore(ids, np.ones(3, np.uint8)))
    assert len(index) == 3
    assert index.find(ids)[1].tolist() == [0, 1, 2]
    index._low[:] = index._low[0]
    assert index.find(ids)[1].tolist() != [0, 1, 2]


def test_real_stores(tmp_path: Path) -> None:
    first, second = make_manifest(rows=10), make_manifest(rows=7, shard_rows=3)
    write_store(tmp_path / "a", first, seed=1)
    with StoreWriter.create_or_resume(tmp_path / "b", second, fsync=False) as writer:
        for shard in (0, 2):  # incomplete
            block = make_block(second, shard, seed=2)
            if shard == 2:  # one row of the first store
                block = dataclasses.replace(block, pair_id=make_block(first, 1, seed=1).pair_id[:1])
            writer.write_shard(block)
    stores = [ActivationStore.open(tmp_path / name, allow_incomplete=True) for name in ("a", "b")]
    index = PairIndex(stores)
    assert len(index) == 8 + 3
    a, b = stores[0].pair_ids(), stores[1].pair_ids()
    owner, row = index.find(np.concatenate([a, b, np.full((1, 16), 255, np.uint8)]))
    quarantined, missing = -1, -1
    assert owner[:10].tolist() == [0, 0, 0, quarantined, 0, 0, 0, 0, quarantined, 0]
    assert row[:10].tolist() == [0, 1, 2, -1, 4, 5, 6, 7, -1, 9]
    assert owner[10:].tolist() == [1, 1, 1, missing, missing, missing, 0, -1]
    assert row[10:].tolist() == [0, 1, 2, -1, -1, -1, 4, -1]
    assert PairIndex([]).find(a)[0].tolist() == [-1] * 10


NEEDED_THE_SAME = [
    "backend",
    "model_fingerprint",
    "pooling",
    "dtype",
    "compute_dtype",
    "width",
]  # and what went through float32


@pytest.mark.parametrize("field", sorted(OTHER))
def test_compatible(field: str) -> None:
    store, needed = make_manifest(), make_manifest(**{field: OTHER[field]})
    if field in [*NEEDED_THE_SAME, "sides"]:
        with pytest.raises(StoreMismatchError, match="cannot be reused") as caught:
            compatible(store, needed)
        assert caught.value.field == field
    else:
        compatible(store, needed)


@pytest.mark.parametrize(
    ("store", "needed", "fits"),
    [
        ({"layers": (2, 5)}, {"layers": (5,)}, True),
        ({"layers": (2,)}, {"layers": (2, 5)}, False),
        ({"sides": True}, {"sides": False}, True),
        ({"sides": False}, {"sides": True}, False),
        ({"codec": "zstd:3"}, {"codec": "blosc-lz4:5"}, True),
        ({"dtype": "float16"}, {"dtype": "int8"}, True),
        ({"dtype": "bfloat16", "converted_from": "int8"}, {"dtype": "int8"}, True),
        ({"dtype": "int8"}, {"dtype": "float16"}, False),
        ({"converted_from": "float32"}, {"codec": "none"}, True),
        ({"converted_from": "int8"}, {"converted_from": None}, False),
        ({"converted_from": "bfloat16"}, {"converted_from": None}, False),
    ],
)
def test_more_may_be_there_than_is_needed(store: dict[str, Any], needed: dict[str, Any], fits: bool) -> None:
    if fits:
        compatible(make_manifest(**store), make_manifest(**needed))
    else:
        with pytest.raises(StoreMismatchError, match=next(iter(store))):
            compatible(make_manifest(**store), make_manifest(**needed))
