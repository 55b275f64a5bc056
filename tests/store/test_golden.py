"""The bytes on disk do not change under a schema version; see tests/golden/make_store.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pairtrace.store import writer as writer_module
from pairtrace.store.reader import ActivationStore
from pairtrace.store.verify import verify
from tests.golden import make_store as golden
from tests.store.samples import chunk_files


def assert_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "GOLDEN", tmp_path / "acts.zarr")
    kept = Path(golden.__file__).parent / "acts.zarr"
    golden.main()
    names = [path.relative_to(kept) for path in chunk_files(kept)]
    assert names == [path.relative_to(tmp_path / "acts.zarr") for path in chunk_files(tmp_path / "acts.zarr")]
    assert len(names) == 18
    for name in names:
        assert (tmp_path / "acts.zarr" / name).read_bytes() == (kept / name).read_bytes(), name
    made, wanted = (json.loads((root / "zarr.json").read_text()) for root in (tmp_path / "acts.zarr", kept))
    assert made["attributes"] == wanted["attributes"]


def test_the_writer_makes_the_golden_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bytes(tmp_path, monkeypatch)


def test_a_changed_encoding_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = writer_module.encode
    monkeypatch.setattr(writer_module, "encode", lambda spec, values: encode(spec, values)[:-1])
    with pytest.raises(AssertionError):
        assert_same_bytes(tmp_path, monkeypatch)


def test_the_golden_store_is_read() -> None:
    store = ActivationStore.open(golden.GOLDEN)
    assert store.manifest == golden.MANIFEST
    for array, expected in (("diff", golden.DIFF), ("chosen", golden.CHOSEN), ("rejected", golden.REJECTED)):
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.blocks(7, array)]), expected)
        np.testing.assert_array_equal(store.take(7, [2, 0], array), expected[[2, 0]])
    np.testing.assert_array_equal(store.norms(7), golden.NORM)
    np.testing.assert_array_equal(store.pair_ids(), golden.PAIR_ID)
    np.testing.assert_array_equal(store.tokens(), golden.TOKENS)
    np.testing.assert_array_equal(store.status(), golden.STATUS)
    assert store.reasons().tolist() == golden.REASON
    assert store.sources().tolist() == golden.SOURCE
    assert verify(golden.GOLDEN).ok
