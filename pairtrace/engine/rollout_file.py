"""Rollouts files: those that `behavior` wrote, and a user's own."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairtrace.engine.prompts import DISTRACTOR, PLAIN, PromptSet, check_messages
from pairtrace.engine.rollout_table import BASE, METADATA_KEY, SCHEMA, TUNED, RolloutTable
from pairtrace.errors import DataFormatError, DataMismatchError

_MODEL_NAMES = {"base": BASE, "m0": BASE, "tuned": TUNED, "m1": TUNED}
# What a column may hold, and how to say so.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "response": ((str, type(None)), "text"),
    "sample": ((int, type(None)), "a whole number"),
    "prompt_id": ((str, int), "text or a whole number"),
    "prompt": ((str,), "text"),
}


def read_rollouts(
    path: str | Path, *, prompts: PromptSet | None = None, label_column: str | None = None
) -> RolloutTable:
    """Read rollouts that `behavior` wrote, or a user's own.

    Args:
        path: `.parquet`, `.jsonl` or `.jsonl.gz`. Needed columns: `model` (base or M0, tuned or M1), `response`, and
            one of `messages` (list of messages or its JSON), `prompt` (text), `prompt_id` (looked up in `prompts`).
            Optional: `condition` (plain if absent), `prompt_id`, `sample`, `verdict`.
        prompts: the prompt file, for rollouts that only carry ids.
        label_column: column with the verdicts (true or 1: shows the behaviour; null: undecided). In a file that
            `behavior` wrote they replace its own verdicts, and what the file says about its making stays known.

    Raises:
        DataFormatError: unreadable, a column is missing (the message lists those found) or a value is not allowed;
            rows count from 0.
        DataMismatchError: ids that are not in `prompts`.
    """
    path = Path(path)
    raw = _read_table(path)
    if raw.num_rows == 0:
        raise DataFormatError(f"{path}: no rollouts; expected at least one row per model")
    for needed in ("model", "response", *([label_column] if label_column else [])):
        _require(raw, needed, path)
    metadata = (raw.schema.metadata or {}).get(METADATA_KEY)
    if metadata is not None and set(SCHEMA.names) <= set(raw.column_names):
        own = _own_table(raw, metadata, path)
        if label_column is None:
            return own
        return own.with_verdicts(_labels(raw, label_column, path), f"column:{label_column}")
    count = raw.num_rows
    condition = _conditions(raw, path)
    messages, identifiers = _conversations(raw, condition, prompts, path)
    verdict = _labels(raw, label_column or "verdict", path)
    judge = f"column:{label_column or 'verdict'}"
    columns: dict[str, Any] = {
        "prompt_id": identifiers,
        "condition": condition,
        "model": _models(raw, path),
        "sample": _values(raw, "sample", path) if "sample" in raw.column_names else list(range(count)),
        "messages": messages,
        "response": [text or "" for text in _values(raw, "response", path)],
        "verdict": verdict,
        "judge": [judge if value is not None else "" for value in verdict],
    }
    arrays = [pa.array(columns.get(field.name, [None] * count), field.type) for field in SCHEMA]
    return RolloutTable(pa.table(arrays, schema=SCHEMA), {"judge": judge, "rollouts": str(path)})


def _own_table(raw: pa.Table, metadata: bytes, path: Path) -> RolloutTable:
    """The table of a file that `behavior` wrote, whatever columns were added to it since."""
    try:
        manifest = json.loads(metadata)
        table = raw.select(SCHEMA.names).replace_schema_metadata(None).cast(SCHEMA)
    except (ValueError, pa.ArrowException) as error:
        raise DataFormatError(f"{path} is damaged or was changed after it was written: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity", {}), dict):
        raise DataFormatError(f"{path} is damaged: its manifest is not a JSON object with an identity")
    return RolloutTable(table, manifest)


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise DataFormatError(f"cannot read the rollouts file {path}: there is no such file") from error
    except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
        advice = "; where a command made it, delete it to ask the models again" if path.suffix == ".parquet" else ""
        raise DataFormatError(f"cannot read the rollouts file {path}: {error}{advice}") from error
    rows = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataFormatError(f"{path}, line {number}: invalid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataFormatError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
            rows.append(_checked(row, f"{path}, line {number}"))
    # Of every row, not of the first alone, which is where from_pylist would look.
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise DataFormatError(
            f"{path}: a column mixes types or holds a value that no table can hold: {error}"
        ) from error


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    """One JSON row, with the columns that JSON may mix types in brought to text."""
    for column in _KINDS:
        if column in row and not (column == "prompt" and "messages" in row):
            _require_kind(column, row[column], where)
    if "prompt_id" in row:
        row["prompt_id"] = str(row["prompt_id"])
    if isinstance(row.get("messages"), list):
        row["messages"] = json.dumps(row["messages"], ensure_ascii=False)
    return row


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


def _require_kind(column: str, value: Any, where: str) -> None:
    """Refuse a value that another type would silently stand for (a null prompt is not the text "None")."""
    kinds, words = _KINDS[column]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise DataFormatError(f"{where}: {column} is {value!r}; expected {words}")


def _values(raw: pa.Table, column: str, path: Path) -> list[Any]:
    values: list[Any] = raw[column].to_pylist()
    for row, value in enumerate(values):
        _require_kind(column, value, f"{path}, row {row}")
    return values


def _conversations(
    raw: pa.Table, condition: list[str], prompts: PromptSet | None, path: Path
) -> tuple[list[str], list[str]]:
    """Per row: the JSON of its messages, and its prompt id."""
    names = raw.column_names
    identifiers = [str(value) for value in _values(raw, "prompt_id", path)] if "prompt_id" in names else None
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
            json.dumps([{"role": "user", "content": value}], ensure_ascii=False)
            for value in _values(raw, "prompt", path)
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
    asked = list(zip(identifiers, condition, strict=True))
    without = sorted({name for name, under in asked if under not in known[name].conditions})
    if without:
        raise DataMismatchError(
            f"{path} has distractor rows of {len(without)} prompts that have no distractors in {prompts.path}, for "
            f"example {without[0]!r}"
        )
    cache: dict[tuple[str, str], str] = {}
    texts = []
    for key in asked:
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
