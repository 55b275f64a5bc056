"""A small activation store over a small preference file, with rows of every kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.pairs import open_pairs
from pairtrace.kernels.int8 import encode_int8
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

MODEL = "1" * 64
TOKENIZER = "2" * 64
TEMPLATE = "3" * 64


@dataclass(frozen=True)
class SmallStore:
    path: str
    data: str
    rows: dict[int, np.ndarray]  # layer -> float32 [N, D], as stored
    status: np.ndarray
    sources: list[str]


def write_data(path: Path, sources: list[str]) -> str:
    lines = [
        {"prompt": f"question {row}", "chosen": f" yes {row}", "rejected": f" no {row}", "source": source}
        for row, source in enumerate(sources)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def make_store(
    root: Path,
    *,
    rows: int = 300,
    width: int = 24,
    layers: tuple[int, ...] = (2, 5),
    dtype: str = "float16",
    sources: list[str] | None = None,
    quarantined: tuple[int, ...] = (7, 130),
    zero: tuple[int, ...] = (11,),
    skip_shards: tuple[int, ...] = (),
    seed: int = 0,
    tokens: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    **manifest_fields: Any,
) -> SmallStore:
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = sources or [("web", "code", "chat")[row % 3] for row in range(rows)]
    data = write_data(root / "pairs.jsonl", names)
    opened = open_pairs(data)
    fields: dict[str, Any] = {
        "rows": rows,
        "width": width,
        "layers": layers,
        "dtype": dtype,
        "shard_rows": 64,
        "compute_dtype": "float32",
        "model": "m0",
        "model_fingerprint": MODEL,
        "tokenizer_fingerprint": TOKENIZER,
        "template_fingerprint": TEMPLATE,
        "data_fingerprint": opened.fingerprint,
        "data": data,
        "data_format": opened.format,
        "columns": opened.columns,
        "max_length": 1024,
        "truncation": "keep_start",
    }
    manifest = Manifest(**{**fields, **manifest_fields})
    stored: dict[int, np.ndarray] = {}
    values: dict[int, np.ndarray] = {}
    status = np.ones(rows, np.uint8)
    status[list(quarantined)] = 2
    for layer in layers:
        exact = (rng.normal(size=(rows, width)) if vectors is None else vectors).astype(np.float32)
        exact[list(quarantined) + list(zero)] = 0
        if dtype == "bfloat16":
            words = (exact.view(np.uint32) >> 16).astype(np.uint16)
            stored[layer], values[layer] = words, (words.astype(np.uint32) << 16).view(np.float32)
        elif dtype == "int8":
            # Every shard has scales of its own, from its own rows.
            decoded = [encode_int8(exact[start : start + 64]).decode() for start in range(0, rows, 64)]
            stored[layer], values[layer] = exact, np.concatenate(decoded)
        else:
            stored[layer] = exact.astype(dtype)
            values[layer] = stored[layer].astype(np.float32)
    identifiers = rng.integers(0, 256, size=(rows, 16), dtype=np.uint8)
    counts = np.ones((rows, 3), np.int32) if tokens is None else tokens.astype(np.int32)
    with StoreWriter.create_or_resume(root / "acts.zarr", manifest, fsync=False) as writer:
        for shard in writer.missing_shards():
            span = slice(64 * shard, min(64 * shard + 64, rows))
            if shard in skip_shards:
                status[span] = 0
                continue
            writer.write_shard(
                ShardBlock(
                    index=shard,
                    pair_id=identifiers[span],
                    tokens=counts[span],
                    status=status[span],
                    reason=["identical: test" if s == 2 else "" for s in status[span]],
                    source=names[span],
                    diff={layer: stored[layer][span] for layer in layers},
                    norm={layer: np.linalg.norm(values[layer][span], axis=1).astype(np.float32) for layer in layers},
                )
            )
    return SmallStore(str(root / "acts.zarr"), data, values, status, names)


def reference_cosine(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """float64 cosine per row, straight from its definition; NaN for zero rows."""
    result = []
    for row in rows.astype(np.float64):
        length = float(np.sqrt((row * row).sum()))
        other = direction.astype(np.float64)
        result.append((row @ other) / (length * float(np.sqrt((other * other).sum()))) if length else np.nan)
    return np.array(result)


def any_values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
