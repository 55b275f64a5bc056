"""Make the golden stores again. Run by hand, only when the schema version changes: python -m tests.golden.make_store

The values are written out, so that neither a random generator nor pairtrace decides them. `acts.zarr` has schema 1, the
others schema 2.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pairtrace.kernels.int8 import ScaledRows
from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

FOLDER = Path(__file__).parent

SCHEMA_1 = Manifest(
    schema_version=1,
    rows=3,
    width=4,
    layers=(7,),
    dtype="float16",
    sides=True,
    shard_rows=2,
    compute_dtype="float32",
    model="golden",
    model_fingerprint="0" * 64,
    tokenizer_fingerprint="1" * 64,
    template_fingerprint="2" * 64,
    data_fingerprint="3" * 64,
    data="golden.jsonl",
    data_format="standard",
    columns={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "source": "source"},
    max_length=64,
    truncation="keep_start",
    attention="eager",
    limit=None,
    created="2026-01-01T00:00:00Z",
    versions={"pairtrace": "0.1.0"},
)

CHOSEN = np.array([[1.0, 2.0, -0.5, 0.25], [0.0, 0.0, 0.0, 0.0], [3.0, -4.0, 1.5, 0.125]], np.float16)
REJECTED = np.array([[0.5, 1.0, 0.5, -0.25], [0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.5, 0.625]], np.float16)
DIFF = np.array([[0.5, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [2.0, -2.0, 1.0, -0.5]], np.float16)
NORM = np.array([2.5**0.5, 0.0, 9.25**0.5], np.float32)
PAIR_ID = np.array([range(1, 17), [0] * 16, range(101, 117)], np.uint8)
TOKENS = np.array([[5, 6, 7], [4, 0, 3], [300, 70000, 1]], np.int32)
STATUS = np.array([1, 2, 1], np.uint8)
REASON = ["", "empty_response: chosen is empty", ""]
SOURCE = ["helpful", "überprüft", ""]


# The same rows, exactly, as int8 with the scales of their rows and, below, of the columns of each shard.
SCALED = {
    "diff": (np.array([[32, 64, -64, 32], [0, 0, 0, 0], [32, -64, 64, -64]], np.int8), [1 / 64, 0, 1 / 32]),
    "chosen": (np.array([[32, 64, -16, 8], [0, 0, 0, 0], [24, -64, 48, 8]], np.int8), [1 / 32, 0, 1 / 16]),
    "rejected": (np.array([[32, 64, 32, -16], [0, 0, 0, 0], [16, -64, 32, 80]], np.int8), [1 / 64, 0, 1 / 32]),
}
COLUMN_SCALES = np.array([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5, 0.25]], np.float32)

_SCHEMA_2 = dataclasses.replace(
    SCHEMA_1, schema_version=2, split="train", chat_template="golden.jinja", template_date="2026-01-31"
)
STORES = {
    "acts.zarr": SCHEMA_1,
    "int8.zarr": dataclasses.replace(_SCHEMA_2, dtype="int8", converted_from="float16"),
    "zstd.zarr": dataclasses.replace(_SCHEMA_2, codec="zstd:3"),
    "blosc.zarr": dataclasses.replace(_SCHEMA_2, codec="blosc-lz4:5"),
}


def rows_of(manifest: Manifest, group: str, shard: int) -> np.ndarray | ScaledRows:
    """Rows of one shard in the type of a store."""
    rows = (slice(0, 2), slice(2, 3))[shard]
    if manifest.dtype != "int8":
        return {"diff": DIFF, "chosen": CHOSEN, "rejected": REJECTED}[group][rows]
    values, row_scale = SCALED[group]
    return ScaledRows(values[rows], np.array(row_scale, np.float32)[rows], COLUMN_SCALES[shard])


def write(path: Path, manifest: Manifest) -> None:
    """Write one of the stores, without its lock file."""
    with StoreWriter.create_or_resume(path, manifest) as writer:
        for index, rows in enumerate((slice(0, 2), slice(2, 3))):
            sides: dict[str, Mapping[int, np.ndarray | ScaledRows]] = {
                group: {7: rows_of(manifest, group, index)} for group in ("diff", "chosen", "rejected")
            }
            writer.write_shard(
                ShardBlock(
                    index=index,
                    pair_id=PAIR_ID[rows],
                    tokens=TOKENS[rows],
                    status=STATUS[rows],
                    reason=REASON[rows],
                    source=SOURCE[rows],
                    norm={7: NORM[rows]},
                    **sides,
                )
            )
    (path / "status" / ".lock").unlink()


def main() -> None:
    """Replace the golden stores."""
    for name, manifest in STORES.items():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write(FOLDER / name, manifest)


if __name__ == "__main__":
    main()
