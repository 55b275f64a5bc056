"""Rows like a model's differences of means, and stores of them: what the benchmarks of kernels and store work on.

Letters: N rows, D width, S rows per shard.

A row is Gaussian with one scale per dimension, a few of them fifty times the others, as in residual streams. A number
of distinct rows is repeated to any length: no competitor gains from that, each reads every byte of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.store.layout import array_specs
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

LAYER = 20
SHARD_ROWS = 2048
# A multiple of the shard, so that every shard begins at the same places of the repeated rows.
DISTINCT_ROWS = 4 * SHARD_ROWS
PRODUCTION_ROWS, PRODUCTION_WIDTH = 378_341, 4096


def distinct_rows(width: int, count: int = DISTINCT_ROWS, seed: int = 0) -> np.ndarray:
    """Rows in float16, [count, D]."""
    rng = np.random.default_rng(seed)
    scale = 0.05 * np.exp(0.5 * rng.standard_normal(width, dtype=np.float32))
    scale[rng.choice(width, max(1, width // 1024), replace=False)] *= 50
    rows = rng.standard_normal((count, width), dtype=np.float32)
    rows *= scale
    return rows.astype(np.float16)


def repeated(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows over and over, [count, ...], every one in memory of its own."""
    out = np.empty((count, *rows.shape[1:]), rows.dtype)
    for start in range(0, count, len(rows)):
        part = out[start : start + len(rows)]
        part[:] = rows[: len(part)]
    return out


def make_manifest(rows: int, width: int, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "rows": rows,
        "width": width,
        "layers": (LAYER,),
        "shard_rows": SHARD_ROWS,
        "compute_dtype": "float32",
        "model": "synthetic",
        **{f"{name}_fingerprint": "0" * 64 for name in ("model", "tokenizer", "template", "data")},
        "data": "synthetic.jsonl",
        "data_format": "standard",
        "max_length": 1024,
        "truncation": "keep_start",
    }
    return Manifest(**{**values, **changes})


def shard_blocks(manifest: Manifest, rows: np.ndarray, shards: list[int]) -> Iterator[ShardBlock]:
    """Shards of a store with the given rows repeated.

    Args:
        manifest: of a float16 store with one layer.
        rows: float16 [n S, D].
        shards: their numbers.
    """
    norms = np.concatenate([np.linalg.norm(part.astype(np.float32), axis=1) for part in np.array_split(rows, 64)])
    for shard in shards:
        start, stop = array_specs(manifest)["status"].span(shard)
        count, first = stop - start, start % len(rows)
        identity = np.random.default_rng(shard)
        yield ShardBlock(
            index=shard,
            pair_id=identity.integers(1, 256, (count, 16), dtype=np.uint8),
            tokens=np.full((count, 3), 100, np.int32),
            status=np.ones(count, np.uint8),
            reason=[""] * count,
            source=[f"part-{row % 7}" for row in range(start, stop)],
            diff={LAYER: rows[first : first + count]},
            norm={LAYER: norms[first : first + count]},
        )


def write_store(path: Path, manifest: Manifest, rows: np.ndarray, *, fsync: bool = True) -> None:
    """Make a store of repeated rows, or what is missing of one."""
    with StoreWriter.create_or_resume(path, manifest, fsync=fsync) as writer:
        for block in shard_blocks(manifest, rows, writer.missing_shards()):
            writer.write_shard(block)


def first_rows(path: Path, whole: Path, manifest: Manifest, rows: np.ndarray) -> None:
    """A store of the first rows of another one: whole shards are hard links, so that they take no room and no time.

    Args:
        path: the store to make.
        whole: a complete store of the same rows.
        manifest: of the store to make.
        rows: as for `write_store`, for the last shard.
    """
    with StoreWriter.create_or_resume(path, manifest, fsync=False) as writer:
        for shard in range(manifest.rows // manifest.shard_rows):
            for spec in array_specs(manifest).values():  # the mark comes last
                link = path / spec.key(shard)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(whole / spec.key(shard))
        for block in shard_blocks(manifest, rows, writer.missing_shards()):
            writer.write_shard(block)
