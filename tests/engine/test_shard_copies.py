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
from tests.engine.shard_runs import (
    SHARD_ROWS,
    StandIn,
    damage,
    manifest_for,
    render,
    run_loop,
    unmark,
)


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


def test_copies_are_not_computed() -> None:
    """Rows to copy stay empty until their originals are there."""
    manifest = manifest_for("aa")
    rendered = [render("a", 0), render("a", 1)]
    work = ShardWork(0, 0, rendered, [0], [Copy(1, OWN_STORE, 0)])
    block = compute_block(work, StandIn(manifest), dtype="float16", sides=False, on_pack=lambda *_: None)
    assert (
        block.diff[2][0].any() and not block.diff[2][1].any() and block.pair_id[0].tolist() == block.pair_id[1].tolist()
    )
