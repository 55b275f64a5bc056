"""Small probes, and examples whose classes are known, for the tests of probes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pairtrace.engine.pairs import open_pairs
from pairtrace.engine.probes.probe_file import Probe
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

SIDES = ("chosen", "rejected")

PRINTS = {"model_fingerprint": "1" * 64, "tokenizer_fingerprint": "2" * 64, "template_fingerprint": "3" * 64}


def make_probe(*, members: int = 1, width: int = 32, layer: int = 2, seed: int = 0, **changed: Any) -> Probe:
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {
        "name": "harm",
        "layer": layer,
        "role": "training",
        "weight": rng.normal(size=(members, width)).astype(np.float32),
        "bias": rng.normal(size=members),
        **PRINTS,
    }
    return Probe(**{**given, **changed})


@dataclass(frozen=True)
class SidedStore:
    """A store with sides: what it holds, and where it and its data lie."""

    path: str
    data: str
    sides: dict[int, dict[str, np.ndarray]]  # layer -> side -> float32 [N, D], as stored
    prompts: np.ndarray  # int64 [N]
    good: np.ndarray  # bool [N], the column `good`
    usable: np.ndarray  # bool [N]

    def labelled(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, labels and prompts of both sides of the usable rows: chosen first."""
        parts = [self.sides[layer][side][self.usable] for side in ("chosen", "rejected")]
        count = int(self.usable.sum())
        return np.concatenate(parts), np.repeat([1, 0], count), np.tile(self.prompts[self.usable], 2)


def make_sided_store(
    root: Path,
    *,
    rows: int = 300,
    width: int = 12,
    layers: tuple[int, ...] = (2, 5),
    dtype: str = "float16",
    sides: bool = True,
    prompt_count: int = 80,
    broken: tuple[int, ...] = (),
    seed: int = 0,
) -> SidedStore:
    """Pairs whose chosen side differs from the rejected one, more clearly at deeper layers; several per prompt."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, prompt_count, rows)
    good = rng.random(rows) < 0.5
    lines = [
        {"prompt": f"question {prompt}", "chosen": f" yes {row}", "rejected": f" no {row}", "source": "web",
         "good": None if row == 5 else bool(good[row]), "rating": row % 7}
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip
    data = root / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = open_pairs(str(data))
    status = np.ones(rows, np.uint8)
    status[[7, 130]] = 2
    values: dict[int, dict[str, np.ndarray]] = {}
    for layer in layers:
        shared = rng.normal(size=(prompt_count, width))[prompts] * 2 + np.linspace(-30, 30, width)
        given = {}
        for side, sign in (("chosen", 1), ("rejected", -1)):
            exact = shared + rng.normal(size=(rows, width))
            exact[:, 0] += sign * 0.2 * layer
            exact[:, 1] += good * layer
            exact[status == 2] = 0
            given[side] = exact.astype(np.float16).astype(np.float32)
        values[layer] = given
    for row in broken:
        values[layers[0]]["chosen"][row, 3] = np.nan
    manifest = Manifest(
        rows=rows, width=width, layers=layers, dtype=dtype, sides=sides, shard_rows=64, compute_dtype="float32",
        model="m0", **PRINTS, data_fingerprint=opened.fingerprint, data=str(data), data_format=opened.format,
        columns=opened.columns, max_length=1024, truncation="keep_start",
    )  # fmt: skip
    with StoreWriter.create_or_resume(root / "acts.zarr", manifest, fsync=False) as writer:
        for shard in writer.missing_shards():
            span = slice(64 * shard, min(64 * shard + 64, rows))
            diff = {
                layer: np.nan_to_num(given["chosen"] - given["rejected"])[span].astype(dtype)
                for layer, given in values.items()
            }
            kept = {side: {layer: values[layer][side][span].astype(dtype) for layer in layers} for side in SIDES}
            writer.write_shard(
                ShardBlock(
                    index=shard,
                    pair_id=rng.integers(1, 256, size=(span.stop - span.start, 16), dtype=np.uint8),
                    tokens=np.ones((span.stop - span.start, 3), np.int32),
                    status=status[span],
                    reason=["identical: test" if one == 2 else "" for one in status[span]],
                    source=["web"] * (span.stop - span.start),
                    diff=diff,
                    norm={layer: np.linalg.norm(rows.astype(np.float32), axis=1) for layer, rows in diff.items()},
                    **(kept if sides else {}),
                )
            )
    return SidedStore(str(root / "acts.zarr"), str(data), values, prompts, good, status == 1)
