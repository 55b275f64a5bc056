"""What is read and checked to copy a row, and what is written for a row that cannot be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.engine.backend import Pooled
from pairtrace.engine.shards import OWN_STORE, Copy, ShardWork, compute_block
from pairtrace.errors import StoreDamagedError
from pairtrace.store.location import LocalLocation
from pairtrace.store.reader import ActivationStore
from pairtrace.store.rows import RowReader
from pairtrace.store.verify import verify
from pairtrace.store.writer import StoreWriter
from tests.engine.shard_runs import (
    SHARD_ROWS,
    StandIn,
    damage,
    manifest_for,
    render,
    run_loop,
    unmark,
)
from tests.store.samples import to_float


@pytest.mark.parametrize("name", ["diff/5", "chosen/2", "rejected/2", "norm/5", "status"])
def test_damage_is_not_copied_from_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run_loop(tmp_path / "first", "b", sides=True)
    other = tmp_path / "other"
    run_loop(other, "aceghijk", sides=True)
    if name == "status":  # a mark that is damaged earlier is found when the store is opened
        original = ActivationStore.row_reader

        def harmed(self: ActivationStore) -> RowReader:
            damage(tmp_path / Path(self.path).name, name, len(self.status()) // SHARD_ROWS - 1)
            return original(self)

        monkeypatch.setattr(ActivationStore, "row_reader", harmed)
    else:
        damage(other, name, 1)
    new = tmp_path / "new"
    with pytest.raises(StoreDamagedError) as caught:
        run_loop(new, "xa--abxhwuvs", [tmp_path / "first", other] if name != "status" else [other], sides=True)
    message = str(caught.value)
    assert f"--reuse: {other}: array {name}, shard 1 (rows 4 to 7) is damaged" in message
    assert ActivationStore.open(new, allow_incomplete=True).status().tolist() == [1, 1, 2, 2] + [0] * 8


@pytest.mark.parametrize("name", ["diff/5", "row_scale/chosen/2", "column_scale/diff/5"])
def test_damage_of_int8_rows_is_not_copied(tmp_path: Path, name: str) -> None:
    run_loop(tmp_path / "other", "aceghijk", sides=True, dtype="int8", codec="zstd:3")
    damage(tmp_path / "other", name, 1)
    with pytest.raises(StoreDamagedError, match=rf"--reuse: .*array {name}, shard 1 \(rows 4 to 7\) is damaged"):
        run_loop(tmp_path / "new", "xa--hk", [tmp_path / "other"], sides=True, dtype="int8")


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_an_int8_store_takes_rows_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    """The copy is the row of the other store, rounded to int8 with the rows that it now stands beside."""
    other, new = tmp_path / "other", tmp_path / "new"
    run_loop(other, "abcdefg", dtype=dtype, codec="blosc-zstd:1")
    works = run_loop(new, "hfabc", [other], dtype="int8")
    assert [copy.row for work in works.values() for copy in work.copies] == [5, 0, 1, 2]
    theirs, ours = ActivationStore.open(other), ActivationStore.open(new)
    assert verify(new).ok
    for layer in ours.layers:
        expected = to_float(theirs.take(layer, [5, 0, 1, 2]), dtype)
        found = ours.take(layer, [1, 2, 3, 4])
        # Half a step of 127, in columns of about equal size.
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 127)
        assert np.abs(found - expected).max() > 0 or dtype == "int8"
        np.testing.assert_array_equal(ours.norms(layer)[1:], theirs.norms(layer)[[5, 0, 1, 2]])


@pytest.mark.parametrize("name", ["diff/5", "chosen/2", "rejected/2", "norm/5", "reason", "pair_id"])
def test_damage_is_not_copied_from_an_earlier_shard(tmp_path: Path, name: str) -> None:
    text = "wxyzab!cefgh!bij"
    run_loop(tmp_path, text, sides=True)
    unmark(tmp_path, 3)
    damage(tmp_path, name, 1)
    with pytest.raises(StoreDamagedError, match=rf"^{tmp_path}: array {name}, shard 1 \(rows 4 to 7\) is damaged"):
        run_loop(tmp_path, text, sides=True)
    unmark(tmp_path, 1)
    run_loop(tmp_path, text, sides=True)
    assert verify(tmp_path).ok


def test_a_copy_without_checksums_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: what the copies would be, had the damage not been looked for; the store then verifies."""
    original = RowReader.take
    monkeypatch.setattr(RowReader, "take", lambda self, name, rows: original(self, name, rows, checksum=False))
    run_loop(tmp_path / "other", "abcd")
    damage(tmp_path / "other", "diff/5", 0)
    run_loop(tmp_path / "new", "ab", [tmp_path / "other"])
    assert verify(tmp_path / "new").ok and not verify(tmp_path / "other").ok


def test_only_the_chunks_of_copied_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One opening for the run, and for each shard only what it copies: not the whole store for every shard."""
    reads: list[str] = []
    original = LocalLocation.read

    def logged(self: LocalLocation, key: str) -> np.ndarray | None:
        reads.append(key)
        return original(self, key)

    monkeypatch.setattr(LocalLocation, "read", logged)
    text = "abc!defghijkb!llmnob"
    run_loop(tmp_path, text)
    chunks = [key for key in reads if "/c/" in key]
    assert sorted(chunks) == sorted(
        [
            "status/c/0",
            "reason/c/0",
            *(f"norm/{layer}/c/0" for layer in (2, 5)),
            *(f"diff/{layer}/c/0/0" for layer in (2, 5)),
        ]
        + ["status/c/0", *(f"norm/{layer}/c/0" for layer in (2, 5)), *(f"diff/{layer}/c/0/0" for layer in (2, 5))]
    )
    # Creation, the thread that reads ids of earlier runs, and the thread that writes.
    assert reads.count("zarr.json") <= 3


# Rows that are computed but cannot be stored


@pytest.mark.parametrize(
    ("dtype", "sides", "bad"),
    [
        ("float16", False, {0: "overflow", 2: "nonfinite_activations", 3: "out_of_memory"}),
        ("float16", True, {0: "overflow", 1: "overflow", 2: "nonfinite_activations", 3: "out_of_memory"}),
        ("bfloat16", True, {2: "nonfinite_activations", 3: "out_of_memory"}),
        ("float32", True, {2: "nonfinite_activations", 3: "out_of_memory"}),
        ("int8", True, {2: "nonfinite_activations", 3: "out_of_memory"}),
    ],
)
def test_what_does_not_fit_is_quarantined(dtype: str, sides: bool, bad: dict[int, str]) -> None:
    manifest = manifest_for("abcde", dtype=dtype, sides=sides)
    chosen = np.ones((5, 2, manifest.width), np.float32)
    rejected = np.zeros_like(chosen)
    chosen[0, 1, 2] = 65_520  # the smallest number that rounds to infinity in float16
    chosen[1] = rejected[1] = 1e5  # only the sides are too large
    rejected[2, 0, 0] = np.inf
    chosen[4, 0, 0] = 65_504  # the largest that fits

    class Fixed(StandIn):
        def pool(self, pairs: Any, on_pack: Any = None) -> Pooled:
            return Pooled(chosen=chosen, rejected=rejected, failed=(3,))

    rendered = [render(letter, row) for row, letter in enumerate("-abcde")]
    work = ShardWork(0, 0, rendered, [1, 2, 3, 4, 5], [])
    block = compute_block(work, Fixed(manifest), dtype=dtype, sides=sides, on_pack=lambda *_: None)
    reasons = {0: "empty_response", **{position + 1: code for position, code in bad.items()}}
    assert {row: reason.partition(":")[0] for row, reason in enumerate(block.reason) if reason} == reasons
    assert block.status.tolist() == [2 if row in reasons else 1 for row in range(6)]
    for side in (block.diff, block.norm, block.chosen or {}, block.rejected or {}):
        for layer, values in side.items():
            assert not values[list(reasons)].any()
            assert side is block.rejected or layer == 2 or values[5].any()


def test_what_the_scales_of_int8_rows_cannot_hold_is_quarantined(tmp_path: Path) -> None:
    """The scale of a row grows with the number of its columns and rows, so the limit is far below that of float32."""
    manifest = manifest_for("abc", dtype="int8", width=4096, layers=(2,))
    chosen = np.random.default_rng(0).normal(size=(3, 1, manifest.width)).astype(np.float32)
    chosen[0] = 0
    chosen[0, 0, 0], chosen[1, 0, 0] = 1e30, 1.1e30
    chosen[1, 0, 1:] = 0

    class Fixed(StandIn):
        def pool(self, pairs: Any, on_pack: Any = None) -> Pooled:
            return Pooled(chosen=chosen, rejected=np.zeros_like(chosen))

    work = ShardWork(0, 0, [render(letter, row) for row, letter in enumerate("abc")], [0, 1, 2], [])
    block = compute_block(work, Fixed(manifest), dtype="int8", sides=False, on_pack=lambda *_: None)
    assert block.status.tolist() == [1, 2, 1] and block.reason[1].startswith("overflow: a value of 1.1e+30")
    with StoreWriter.create_or_resume(tmp_path, manifest, fsync=False) as writer:
        writer.write_shard(block)
    assert verify(tmp_path).ok


def test_copies_are_not_computed() -> None:
    """Rows to copy stay empty until their originals are there."""
    manifest = manifest_for("aa")
    rendered = [render("a", 0), render("a", 1)]
    work = ShardWork(0, 0, rendered, [0], [Copy(1, OWN_STORE, 0)])
    block = compute_block(work, StandIn(manifest), dtype="float16", sides=False, on_pack=lambda *_: None)
    assert (
        block.diff[2][0].any() and not block.diff[2][1].any() and block.pair_id[0].tolist() == block.pair_id[1].tolist()
    )
