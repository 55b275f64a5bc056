"""The rollouts table: every sampled response with its verdict.

Columns: `prompt_id`, `condition` ("plain", "distractor"), `model` ("base", "tuned"), `sample`, `messages` (JSON of the
conversation that was sent), `response`, `tokens`, `finished` (an end token was reached), `verdict` (true: shows the
behaviour; null: undecided), `judge`, `seed`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.atomic import replacing
from pairtrace.engine.judge import Judge
from pairtrace.engine.progress import NULL_PROGRESS, Progress

BASE = "base"
TUNED = "tuned"
METADATA_KEY = b"pairtrace"
_COLUMNS: dict[str, pa.DataType] = {
    "prompt_id": pa.string(),
    "condition": pa.string(),
    "model": pa.string(),
    "sample": pa.int64(),
    "messages": pa.string(),
    "response": pa.string(),
    "tokens": pa.int64(),
    "finished": pa.bool_(),
    "verdict": pa.bool_(),
    "judge": pa.string(),
    "seed": pa.int64(),
}
SCHEMA = pa.schema(_COLUMNS)
_JUDGE_BATCH = 4096


@dataclass(frozen=True)
class RolloutTable:
    """Rollouts in columns.

    Attributes:
        table: rows with the columns of `SCHEMA`.
        manifest: how they were made ({} for a user's own file).
        has_verdicts: at least one verdict is decided.
    """

    table: pa.Table
    manifest: dict[str, Any]

    @property
    def has_verdicts(self) -> bool:
        """True when at least one verdict is decided."""
        return self.table["verdict"].null_count < self.table.num_rows

    def strings(self, column: str) -> np.ndarray:
        """A text column as an object array."""
        return np.asarray(self.table[column].to_pylist(), dtype=object)

    def verdicts(self) -> np.ndarray:
        """Verdicts as int8: 1 shows the behaviour, 0 does not, -1 undecided."""
        values = self.table["verdict"].to_pylist()
        return np.array([-1 if value is None else int(value) for value in values], dtype=np.int8)

    def judged(self, judge: Judge, progress: Progress = NULL_PROGRESS) -> RolloutTable:
        """The same rollouts with this judge's verdicts."""
        verdicts: list[bool | None] = []
        progress.start("judge", self.table.num_rows, "responses")
        for batch in self.table.select(["messages", "response"]).to_batches(max_chunksize=_JUDGE_BATCH):
            conversations = [json.loads(str(text)) for text in batch["messages"].to_pylist()]
            verdicts += judge.verdicts(conversations, [str(text) for text in batch["response"].to_pylist()])
            progress.advance(batch.num_rows)
        progress.finish()
        return self.with_verdicts(verdicts, judge.name)

    def with_verdicts(self, verdicts: Sequence[bool | None], judge: str) -> RolloutTable:
        """The same rollouts with other verdicts, one per row, given by `judge`."""
        assert len(verdicts) == self.table.num_rows
        names = pa.array([judge] * self.table.num_rows, pa.string())
        table = self.table.set_column(SCHEMA.get_field_index("verdict"), "verdict", pa.array(verdicts, pa.bool_()))
        return RolloutTable(
            table.set_column(SCHEMA.get_field_index("judge"), "judge", names), {**self.manifest, "judge": judge}
        )

    def write(self, path: str | Path) -> None:
        """Write parquet, complete or not at all."""
        metadata = {METADATA_KEY: json.dumps(self.manifest, sort_keys=True).encode()}
        with replacing(path) as temporary:
            pq.write_table(self.table.replace_schema_metadata(metadata), temporary)
