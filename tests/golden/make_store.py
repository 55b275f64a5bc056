"""Make the golden store again. Run by hand, only when the schema version changes: python -m tests.golden.make_store

The values are written out, so that neither a random generator nor pairtrace decides them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from pairtrace.store.manifest import Manifest
from pairtrace.store.writer import ShardBlock, StoreWriter

GOLDEN = Path(__file__).parent / "acts.zarr"

MANIFEST = Manifest(
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


def main() -> None:
    """Replace the golden store."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with StoreWriter.create_or_resume(GOLDEN, MANIFEST) as writer:
        for index, rows in enumerate((slice(0, 2), slice(2, 3))):
            writer.write_shard(
                ShardBlock(
                    index=index,
                    pair_id=PAIR_ID[rows],
                    tokens=TOKENS[rows],
                    status=STATUS[rows],
                    reason=REASON[rows],
                    source=SOURCE[rows],
                    diff={7: DIFF[rows]},
                    norm={7: NORM[rows]},
                    chosen={7: CHOSEN[rows]},
                    rejected={7: REJECTED[rows]},
                )
            )
    (GOLDEN / "status" / ".lock").unlink()


if __name__ == "__main__":
    main()
