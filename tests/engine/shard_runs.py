"""Whole shard loops without a model: rows are letters, and a stand-in shows which of them were computed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairtrace.engine import shard_loop
from pairtrace.engine.backend import Pooled
from pairtrace.engine.progress import NULL_PROGRESS
from pairtrace.engine.rendered import Quarantined, RenderedPair, content_id
from pairtrace.engine.shards import ShardWork
from pairtrace.store.manifest import Manifest
from pairtrace.store.reader import ActivationStore
from pairtrace.store.writer import StoreWriter
from tests.store.samples import make_manifest

SHARD_ROWS = 4
# A row without a pair; a pair that float16 cannot hold; one whose mean is NaN.
UNUSABLE, TOO_LARGE, NOT_A_NUMBER = "-", "!", "?"


def render(letter: str, row: int) -> RenderedPair | Quarantined:
    if letter == UNUSABLE:
        return Quarantined(row=row, source=f"source-{row}", reason=f"empty_response: row {row}")
    chosen, rejected = np.array([1, ord(letter), 3], np.int32), np.array([1, ord(letter)], np.int32)
    return RenderedPair(
        row=row,
        source=f"source-{row}",
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_start=1,
        rejected_start=1,
        pair_id=content_id(chosen, 1, rejected, 1),
    )


class Letters:
    """Stands for the data and its renderer."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.rows = len(text)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, int]]:
        yield from zip(self.text[start:stop], range(start, stop), strict=True)

    def render(self, pairs: Sequence[tuple[str, int]]) -> list[RenderedPair | Quarantined]:
        return [render(letter, row) for letter, row in pairs]


class StandIn:
    """Gives values that depend on the pair and, as rounding does, a little on what it is computed with."""

    out_of_memory = 0
    token_budget = 100
    device = "none"
    compute_dtype = "float32"

    def __init__(self, manifest: Manifest) -> None:
        self.layers, self.width = manifest.layers, manifest.width

    def pool(self, pairs: Sequence[RenderedPair], on_pack: Any = None) -> Pooled:
        chosen = np.zeros((len(pairs), len(self.layers), self.width), np.float32)
        for place, pair in enumerate(pairs):
            value = {TOO_LARGE: 7e4, NOT_A_NUMBER: np.nan}.get(chr(pair.chosen_ids[1]), float(pair.chosen_ids[1]))
            chosen[place] = value
            for depth in range(len(self.layers)):
                chosen[place, depth] += np.arange(self.width) + depth + 0.5 * place + 8 * len(pairs)
        return Pooled(chosen=chosen, rejected=chosen / -2)


def manifest_for(text: str, **changes: Any) -> Manifest:
    return make_manifest(rows=len(text), shard_rows=SHARD_ROWS, **changes)


def run_loop(path: Path, text: str, reuse: Sequence[Path] = (), **changes: Any) -> dict[int, ShardWork]:
    """Compute the shards of a store that are missing; returns what was decided for each."""
    works: dict[int, ShardWork] = {}
    original = shard_loop.divide

    def logged(index: int, *args: Any) -> ShardWork:
        works[index] = original(index, *args)
        return works[index]

    data: Any = Letters(text)
    manifest = manifest_for(text, **changes)
    others = [ActivationStore.open(other, allow_incomplete=True) for other in reuse]
    with StoreWriter.create_or_resume(path, manifest, fsync=False) as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_loop, "divide", logged)
        missing = writer.missing_shards()
        backend: Any = StandIn(manifest)
        if missing:
            shard_loop.ShardLoop(data, data, writer, str(path), others, NULL_PROGRESS).run(backend, missing)
    return works


def unmark(path: Path, shard: int) -> None:
    """Take a shard away, as if the run had died before it: its mark and, so that nothing can be peeked at, its rows."""
    for chunk in path.glob(f"**/c/{shard}"):
        for file in [chunk] if chunk.is_file() else list(chunk.rglob("*")):
            file.unlink()


def damage(root: Path, name: str, shard: int) -> None:
    """Flip the lowest bit of the first number of a chunk: nothing but its checksum gives that away."""
    path = next(p for p in (root / name / "c").rglob("*") if p.is_file() and f"/c/{shard}" in str(p))
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
