"""The rollouts table: every sampled response with its verdict, as parquet or from a user's own file.

Columns: `prompt_id`, `condition` ("plain", "distractor"), `model` ("base", "tuned"), `sample`, `messages` (JSON of the
conversation that was sent), `response`, `tokens`, `finished` (an end token was reached), `verdict` (true: shows the
behaviour; null: undecided), `judge`, `seed`.
"""

from __future__ import annotations

import gzip
import hashlib
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
from pairtrace.engine.prompts import DISTRACTOR, PLAIN, PromptSet, check_messages
from pairtrace.errors import DataFormatError, DataMismatchError

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
_MODEL_NAMES = {"base": BASE, "m0": BASE, "tuned": TUNED, "m1": TUNED}
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


def read_rollouts(
    path: str | Path, *, prompts: PromptSet | None = None, label_column: str | None = None
) -> RolloutTable:
    """Read rollouts that `behavior` wrote, or a user's own.

    Args:
        path: `.parquet`, `.jsonl` or `.jsonl.gz`. Needed columns: `model` (base or M0, tuned or M1), `response`, and
            one of `messages` (list of messages or its JSON), `prompt` (text), `prompt_id` (looked up in `prompts`).
            Optional: `condition` (plain if absent), `prompt_id`, `sample`, `verdict`.
        prompts: the prompt file, for rollouts that only carry ids.
        label_column: column with the verdicts (true or 1: shows the behaviour; null: undecided).

    Raises:
        DataFormatError: unreadable, a column is missing (the message lists those found) or a value is not allowed.
        DataMismatchError: ids that are not in `prompts`.
    """
    path = Path(path)
    raw = _read_table(path)
    if raw.num_rows == 0:
        raise DataFormatError(f"{path}: no rollouts; expected at least one row per model")
    metadata = (raw.schema.metadata or {}).get(METADATA_KEY)
    if label_column is None and metadata is not None and set(SCHEMA.names) <= set(raw.column_names):
        return RolloutTable(raw.select(SCHEMA.names).replace_schema_metadata(None), json.loads(metadata))
    for needed in ("model", "response", *([label_column] if label_column else [])):
        _require(raw, needed, path)
    count = raw.num_rows
    condition = _conditions(raw, path)
    messages, identifiers = _conversations(raw, condition, prompts, path)
    verdict = _labels(raw, label_column or "verdict", path)
    judge = f"column:{label_column or 'verdict'}"
    columns: dict[str, Any] = {
        "prompt_id": identifiers,
        "condition": condition,
        "model": _models(raw, path),
        "sample": raw["sample"].to_pylist() if "sample" in raw.column_names else list(range(count)),
        "messages": messages,
        "response": [text or "" for text in raw["response"].to_pylist()],
        "verdict": verdict,
        "judge": [judge if value is not None else "" for value in verdict],
    }
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in SCHEMA]
    return RolloutTable(pa.table(arrays, schema=SCHEMA), {"judge": judge, "rollouts": str(path)})


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataFormatError(f"cannot read the rollouts file {path}: {error}") from error
    rows = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataFormatError(f"{path}, line {number}: invalid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataFormatError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            if isinstance(row.get("messages"), list):
                row["messages"] = json.dumps(row["messages"], ensure_ascii=False)
            rows.append(row)
    try:
        return pa.Table.from_pylist(rows, schema=None if rows else SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataFormatError(f"{path}: a column mixes types: {error}") from error


def _require(raw: pa.Table, column: str, path: Path) -> None:
    if column not in raw.column_names:
        hint = ""
        if column == "model":
            hint = "; it says which checkpoint answered: base (M0) or tuned (M1)"
        raise DataFormatError(f"{path}: no column {column!r}; columns found: {', '.join(raw.column_names)}{hint}")


def _models(raw: pa.Table, path: Path) -> list[str]:
    names = []
    for row, value in enumerate(raw["model"].to_pylist()):
        name = _MODEL_NAMES.get(str(value).lower())
        if name is None:
            raise DataFormatError(f"{path}, row {row}: model is {value!r}; expected base (or M0), tuned (or M1)")
        names.append(name)
    return names


def _conditions(raw: pa.Table, path: Path) -> list[str]:
    if "condition" not in raw.column_names:
        return [PLAIN] * raw.num_rows
    values: list[Any] = raw["condition"].to_pylist()
    for row, value in enumerate(values):
        if value not in (PLAIN, DISTRACTOR):
            raise DataFormatError(f"{path}, row {row}: condition is {value!r}; expected plain or distractor")
    return values


def _conversations(
    raw: pa.Table, condition: list[str], prompts: PromptSet | None, path: Path
) -> tuple[list[str], list[str]]:
    """Per row: the JSON of its messages, and its prompt id."""
    names = raw.column_names
    identifiers = [str(value) for value in raw["prompt_id"].to_pylist()] if "prompt_id" in names else None
    if "messages" in names:
        cache: dict[str, str] = {}
        texts = []
        for row, value in enumerate(raw["messages"].to_pylist()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if text not in cache:
                cache[text] = _canonical(text, f"{path}, row {row}")
            texts.append(cache[text])
    elif "prompt" in names:
        texts = [
            json.dumps([{"role": "user", "content": str(value)}], ensure_ascii=False)
            for value in raw["prompt"].to_pylist()
        ]
    elif identifiers is not None and prompts is not None:
        texts = _look_up(identifiers, condition, prompts, path)
    else:
        raise DataFormatError(
            f"{path}: the prompts are missing; expected a column 'messages' or 'prompt', or 'prompt_id' together "
            f"with a prompt file; columns found: {', '.join(names)}"
        )
    if identifiers is None:
        if DISTRACTOR in condition:
            raise DataFormatError(
                f"{path}: four conditions need a column 'prompt_id' that joins the plain and the distractor rows; "
                f"columns found: {', '.join(names)}"
            )
        identifiers = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]
    return texts, identifiers


def _canonical(text: str, where: str) -> str:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise DataFormatError(f"{where}: 'messages' is neither a list nor JSON: {error}") from error
    return json.dumps(list(check_messages(parsed, where)), ensure_ascii=False)


def _look_up(identifiers: list[str], condition: list[str], prompts: PromptSet, path: Path) -> list[str]:
    known = prompts.by_id()
    unknown = sorted(set(identifiers) - set(known))
    if unknown:
        raise DataMismatchError(
            f"{path}: {len(unknown)} prompt ids are not in {prompts.path}, for example {unknown[0]!r}"
        )
    if DISTRACTOR in condition and not prompts.has_distractors:
        raise DataMismatchError(f"{path} has distractor rows, but the prompts of {prompts.path} have no distractors")
    cache: dict[tuple[str, str], str] = {}
    texts = []
    for key in zip(identifiers, condition, strict=True):
        if key not in cache:
            cache[key] = json.dumps(known[key[0]].conversation(key[1]), ensure_ascii=False)
        texts.append(cache[key])
    return texts


def _labels(raw: pa.Table, column: str, path: Path) -> list[bool | None]:
    if column not in raw.column_names:
        return [None] * raw.num_rows
    labels: list[bool | None] = []
    for row, value in enumerate(raw[column].to_pylist()):
        if value is None or value != value:  # noqa: PLR0124 - NaN is how pandas writes a missing label
            labels.append(None)
        elif isinstance(value, bool | int | float) and value in (0, 1):
            labels.append(bool(value))
        else:
            raise DataFormatError(
                f"{path}, row {row}: {column} is {value!r}; expected true or 1 (shows the behaviour), false or 0, "
                "or nothing (undecided)"
            )
    return labels
