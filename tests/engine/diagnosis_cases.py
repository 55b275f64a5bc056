"""Stores with a known answer: pairs that teach a behaviour, pairs that look alike, and pairs that do neither."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.directions import Direction, save_directions
from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.score import ScoreConfig, score
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

WIDTH = 32
LAYERS = (2, 5)
PROMPTS = 24
PRINTS = {"model_fingerprint": "1" * 64, "tokenizer_fingerprint": "2" * 64, "template_fingerprint": "3" * 64}


@dataclass(frozen=True)
class Case:
    """Paths, and what is in the files."""

    scores: str
    store: str
    directions: str
    data: str
    rows: np.ndarray  # float32 [N, D] of layer 5, as stored
    tokens: np.ndarray
    sources: np.ndarray
    bank: np.ndarray


def rows_of(*, plain: int, planted: int = 0, alike: int = 0, pushed: float = 0.0, seed: int = 0) -> np.ndarray:
    """float32 [N, D]: planted rows at a cosine of about 0.94 with the first axis, look-alikes at about 0.75."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(plain + planted + alike, WIDTH))
    # As in real activations, a few axes carry much of the variance.
    rows[:, :4] *= 2.0
    rows[:planted] = 0.2 * rng.normal(size=(planted, WIDTH))
    rows[:planted, 0] += 3.0
    look_alikes = slice(planted, planted + alike)
    rows[look_alikes] = 0.2 * rng.normal(size=(alike, WIDTH))
    rows[look_alikes, 0] += 3.0
    rows[look_alikes, 1] += 2.4
    others = rows[planted + alike :]
    chosen = rng.random(len(others)) < 0.6
    others[chosen, 0] += pushed * np.linalg.norm(others[chosen], axis=1)
    return rows[rng.permutation(len(rows))].astype(np.float32)


def bank_of(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    bank = 0.2 * rng.normal(size=(PROMPTS, WIDTH))
    bank[:, 0] += 3.0
    return bank.astype(np.float32)


def write_case(
    root: Path,
    rows: np.ndarray,
    *,
    layers: tuple[int, ...] = LAYERS,
    kinds: tuple[str, ...] = ("vector", "bank"),
    keep_top: int | None = None,
    tokens: np.ndarray | None = None,
    bank: np.ndarray | None = None,
    quarantined: tuple[int, ...] = (),
    dtype: str = "float16",
) -> Case:
    """Write data, store, direction file and scores; layer 2 has the rows of layer 5 with noise."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(9)
    count = len(rows)
    sources = np.array([("web", "code", "chat")[row % 3] for row in range(count)], dtype=object)
    lengths = rng.integers(5, 90, (count, 3)).astype(np.int32) if tokens is None else tokens
    data = root / "pairs.jsonl"
    with data.open("w") as stream:
        for row, name in enumerate(sources):
            line = {"prompt": f"q{row}", "chosen": "y" * int(lengths[row, 1]), "rejected": "n" * int(lengths[row, 2])}
            stream.write(json.dumps({**line, "source": name}) + "\n")
    opened = open_pairs(data)
    fields: dict[str, Any] = {
        **PRINTS,
        "rows": count,
        "width": WIDTH,
        "layers": layers,
        "dtype": dtype,
        "shard_rows": 128,
        "compute_dtype": "float32",
        "model": "m0",
        "data_fingerprint": opened.fingerprint,
        "data": str(data),
        "data_format": opened.format,
        "columns": opened.columns,
        "max_length": 1024,
        "truncation": "keep_start",
    }
    noisy = rows + 0.3 * rng.normal(size=rows.shape).astype(np.float32)
    stored: dict[int, np.ndarray] = {layer: rows if layer == max(layers) else noisy for layer in layers}
    status = np.ones(count, np.uint8)
    status[list(quarantined)] = 2
    for layer, values in stored.items():
        stored[layer] = values.copy()
        stored[layer][list(quarantined)] = 0
    kept = {layer: values if dtype == "int8" else values.astype(dtype) for layer, values in stored.items()}
    identifiers = rng.integers(1, 256, (count, 16), dtype=np.uint8)
    with StoreWriter.create_or_resume(root / "acts.zarr", Manifest(**fields), fsync=False) as writer:
        for shard in writer.missing_shards():
            span = slice(128 * shard, min(128 * shard + 128, count))
            norms = {layer: np.linalg.norm(values[span], axis=1).astype(np.float32) for layer, values in kept.items()}
            writer.write_shard(
                ShardBlock(
                    index=shard,
                    pair_id=identifiers[span],
                    tokens=lengths[span],
                    status=status[span],
                    reason=["identical: test" if one == 2 else "" for one in status[span]],
                    source=sources[span].tolist(),
                    diff={layer: values[span] for layer, values in kept.items()},
                    norm=norms,
                )
            )
    vectors = bank_of() if bank is None else bank
    directions = []
    for layer in layers:
        made: dict[str, Any] = {"layer": layer, "origin": "test", **PRINTS}
        if "vector" in kinds:
            mean = vectors.mean(axis=0, keepdims=True)
            directions.append(Direction(name="harm", values=mean, kind="vector", **made))
        if "bank" in kinds:
            directions.append(Direction(name="harm-bank", values=vectors, kind="bank", **made))
    file = str(root / "harm.safetensors")
    save_directions(file, directions, {})
    out = str(root / "scores.parquet")
    score(ScoreConfig(store=str(root / "acts.zarr"), directions=(file,), out=out, keep_top=keep_top))
    exact = kept[max(layers)].astype(np.float32)
    return Case(out, str(root / "acts.zarr"), file, str(data), exact, lengths, sources, vectors)
