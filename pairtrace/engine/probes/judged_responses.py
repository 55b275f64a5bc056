"""Judged responses out of the files that `behavior` and `evaluate` leave, or a user's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.evaluation.responses import read_rows
from pairtrace.engine.probes.examples import label_of
from pairtrace.engine.prompts import check_messages
from pairtrace.errors import DataFormatError, DataMismatchError

# In this order: what `behavior` writes, and what `evaluate` writes.
_VERDICTS = ("verdict", "behavior")


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedResponse:
    """One response with its class.

    Attributes:
        row: in the file, from 0.
        prompt: what responses to the same prompt have in common: its id, or its messages where there is none.
        messages: the conversation that was answered.
        response: the answer, not blank.
        label: 1 shows the behaviour, 0 does not.
    """

    row: int
    prompt: str
    messages: list[dict[str, Any]]
    response: str
    label: int


def read_judged(
    path: str, *, label_column: str | None = None, answers_of: Sequence[str] = ()
) -> tuple[list[JudgedResponse], dict[str, int]]:
    """Read the responses that have a verdict.

    Args:
        path: .parquet, .jsonl or .jsonl.gz, see `ExamplesConfig.rollouts`.
        label_column: with the verdicts; None for `verdict` or `behavior`.
        answers_of: models whose responses are read; empty for all.

    Returns:
        The responses, and how many others were left out, by reason.

    Raises:
        DataFormatError: the file cannot be read, or a column is missing or unusable.
        DataMismatchError: it has no response of one of the models.
        ExamplesError: a verdict is something else than true, false or nothing.
    """
    rows = read_rows(Path(path))
    column = label_column or next((name for name in _VERDICTS if rows and name in rows[0]), _VERDICTS[0])
    absent = set(answers_of) - {str(row.get("model")) for row in rows}
    if absent:
        have = ", ".join(sorted({str(row.get("model")) for row in rows}))
        raise DataMismatchError(f"{path} has no responses of {sorted(absent)[0]}; it has those of {have or 'none'}")
    found, left_out = [], Counter[str]()
    parsed: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if answers_of and row.get("model") not in answers_of:
            left_out["of_another_model"] += 1
            continue
        for needed in ("response", column):
            if needed not in row:
                raise DataFormatError(f"{where}: no column {needed!r}; columns found: {', '.join(row)}")
        response, label = row["response"], label_of(row[column], f"{where}: {column}")
        if not isinstance(response, str | None):
            raise DataFormatError(f"{where}: response is {response!r}; expected text")
        if label is None or response is None or not response.strip():
            left_out["without_verdict" if label is None else "empty_response"] += 1
            continue
        text = _conversation(row, where)
        if text not in parsed:
            parsed[text] = list(check_messages(_loaded(text, where), where))
        identifier = row.get("prompt_id")
        found.append(
            JudgedResponse(
                row=number,
                prompt=text if identifier is None else str(identifier),
                messages=parsed[text],
                response=response,
                label=label,
            )
        )
    return found, dict(left_out)


def _conversation(row: dict[str, Any], where: str) -> str:
    """The messages as JSON."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if messages is not None:
        return messages if isinstance(messages, str) else json.dumps(messages, ensure_ascii=False)
    if not isinstance(prompt, str):
        raise DataFormatError(
            f"{where}: expected a conversation in 'messages', or text in 'prompt'; columns found: {', '.join(row)}"
        )
    return json.dumps([{"role": "user", "content": prompt}], ensure_ascii=False)


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataFormatError(f"{where}: 'messages' is neither a list nor JSON: {error}") from error
