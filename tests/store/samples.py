"""Small deterministic stores for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.kernels.int8 import encode_int8
from pairtrace.store.lock import LOCK_KEY
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

ELEMENT = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def make_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "rows": 10,
        "width": 6,
        "layers": (2, 5),
        "shard_rows": 4,
        "compute_dtype": "float32",
        "model": "tiny",
        "model_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
        "template_fingerprint": "c" * 64,
        "data_fingerprint": "d" * 64,
        "data": "pairs.jsonl",
        "data_format": "standard",
        "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "source": None},
        "max_length": 1024,
        "truncation": "keep_start",
        "attention": "segments",
        "created": "2026-01-01T00:00:00Z",
        "versions": {"pairtrace": "0.1.0"},
    }
    return Manifest(**{**values, **changes})


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the store's type; bfloat16 by rounding to nearest even on the bits."""
    if dtype == "int8":  # the writer rounds
        return values
    if dtype != "bfloat16":
        return values.astype(ELEMENT[dtype])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def make_block(manifest: Manifest, shard: int, seed: int = 0) -> ShardBlock:
    """Random rows, the same for the same arguments; every fifth row of the data set is quarantined."""
    start = shard * manifest.shard_rows
    n = min(manifest.rows - start, manifest.shard_rows)
    rng = np.random.default_rng([seed, shard])
    quarantined = (np.arange(start, start + n) % 5) == 3
    chosen, rejected = (
        {layer: rng.normal(size=(n, manifest.width)).astype(np.float32) for layer in manifest.layers} for _ in range(2)
    )
    for side in (chosen, rejected):
        for values in side.values():
            values[quarantined] = 0
    diff = {layer: chosen[layer] - rejected[layer] for layer in manifest.layers}

    def stored(side: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        return {layer: cast(values, manifest.dtype) for layer, values in side.items()}

    return ShardBlock(
        index=shard,
        pair_id=np.where(quarantined[:, None], 0, rng.integers(1, 256, (n, 16))).astype(np.uint8),
        tokens=rng.integers(1, 500, (n, 3)).astype(np.int32),
        status=np.where(quarantined, 2, 1).astype(np.uint8),
        reason=[f"empty_response: row {start + i} is empty é" if q else "" for i, q in enumerate(quarantined.tolist())],
        source=[f"source-{(start + i) % 3}" for i in range(n)],
        diff=stored(diff),
        norm={layer: np.linalg.norm(values, axis=1).astype(np.float32) for layer, values in diff.items()},
        chosen=stored(chosen) if manifest.sides else None,
        rejected=stored(rejected) if manifest.sides else None,
    )


def shard_count(manifest: Manifest) -> int:
    return -(-manifest.rows // manifest.shard_rows)


def write_store(
    path: Path | str,
    manifest: Manifest,
    shards: list[int] | None = None,
    *,
    fsync: bool = False,
    seed: int = 0,
) -> list[ShardBlock]:
    """Create or resume a store and write the shards named, or all that are missing."""
    with StoreWriter.create_or_resume(path, manifest, fsync=fsync) as writer:
        blocks = [
            make_block(manifest, shard, seed) for shard in (writer.missing_shards() if shards is None else shards)
        ]
        for block in blocks:
            writer.write_shard(block)
    return blocks


def expected_arrays(manifest: Manifest, seed: int = 0) -> dict[str, Any]:
    """Every array of the whole store, from the blocks alone."""
    blocks = [make_block(manifest, shard, seed) for shard in range(shard_count(manifest))]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(block, name) for block in blocks]) for name in ("pair_id", "tokens", "status")
    }
    arrays |= {name: [text for block in blocks for text in getattr(block, name)] for name in ("reason", "source")}
    for group in ("diff", "norm", "chosen", "rejected"):
        if getattr(blocks[0], group) is not None:
            for layer in manifest.layers:
                parts = [getattr(block, group)[layer] for block in blocks]
                if manifest.dtype == "int8" and group != "norm":
                    scaled = [encode_int8(part) for part in parts]
                    arrays[f"row_scale/{group}/{layer}"] = np.concatenate([part.row_scale for part in scaled])
                    arrays[f"column_scale/{group}/{layer}"] = np.stack([part.column_scale for part in scaled])
                    parts = [part.values for part in scaled]
                arrays[f"{group}/{layer}"] = np.concatenate(parts)
    return arrays


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Content of every file of a store but the lock, whose content has no meaning."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if name != LOCK_KEY}


def chunk_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and "c" in path.relative_to(root).parts)
