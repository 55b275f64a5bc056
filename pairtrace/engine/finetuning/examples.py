"""Given responses: prompts with the completions that supervised fine-tuning learns.

A row has `prompt` and `completion` (both text, or both messages), as TRL's SFT trainer takes them; or a conversation in
`messages` that ends with the assistant; or `messages` or a text `prompt` with the answer in `response`, which is what
`behavior` and `evaluate` leave.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pairtrace.engine.dialogues import DialogueError, template_messages
from pairtrace.engine.inputs import open_tables
from pairtrace.engine.pair import Message
from pairtrace.engine.tables import Table, Unreadable
from pairtrace.errors import DataFormatError

_COMPLETIONS = ("completion", "response")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row.

    Attributes:
        row: row number in the data, from 0.
        prompt: text or messages; None only when `problem` is set.
        completion: text or messages, like the prompt.
        problem: why this row cannot be used; "" for a good row.
    """

    row: int
    prompt: str | list[Message] | None
    completion: str | list[Message]
    problem: str = ""

    @property
    def conversation(self) -> list[Message]:
        """The prompt as messages; a text is what the user says."""
        assert self.prompt is not None
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def response(self) -> str:
        """The completion as text: what its messages say, one after the other."""
        if isinstance(self.completion, str):
            return self.completion
        contents = (message.get("content") for message in self.completion)
        return "\n".join(content for content in contents if isinstance(content, str))


class ExampleSource:
    """Given responses that can be read in order.

    Attributes:
        rows: number of rows, at most the limit.
    """

    def __init__(self, tables: list[Table], columns: _Columns, limit: int | None) -> None:
        self._tables = tables
        self._columns = columns
        available = sum(table.rows for table in tables)
        self.rows = available if limit is None else min(limit, available)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the content of all files in order and the columns, not the limit."""
        identity = {"content": [table.digest() for table in self._tables], "columns": self._columns.needed}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """One line that says what was recognised."""
        return f"given responses: {self.rows:,} rows; columns {', '.join(self._columns.needed)}"

    def read(self) -> Iterator[Example]:
        """All rows, in order.

        Raises:
            DataFormatError: a file is damaged or changed since it was opened.
        """
        records = (record for table in self._tables for record in table.read(0, table.rows, self._columns.needed))
        for row, record in enumerate(islice(records, self.rows)):
            if isinstance(record, Unreadable):
                yield Example(row=row, prompt=None, completion="", problem=record.reason)
                continue
            try:
                prompt, completion = self._columns.sides(record)
            except DialogueError as error:
                yield Example(row=row, prompt=None, completion="", problem=str(error))
            else:
                yield Example(row=row, prompt=prompt, completion=completion)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where prompt and completion are; `completion` is None where the conversation holds it."""

    prompt: str
    completion: str | None

    @property
    def needed(self) -> list[str]:
        return [self.prompt] if self.completion is None else [self.prompt, self.completion]

    def sides(self, record: Mapping[str, Any]) -> tuple[str | list[Message], str | list[Message]]:
        """Prompt and completion of a row; DialogueError says why there are none."""
        prompt = record.get(self.prompt)
        if self.completion is None:
            messages = template_messages(self.prompt, _loaded(self.prompt, prompt))
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise DialogueError(f"{self.prompt} does not end with an answer of the assistant")
            return messages[:-1], messages[-1:]
        completion = record.get(self.completion)
        if self.prompt == "messages":
            prompt = template_messages(self.prompt, _loaded(self.prompt, prompt))
        if isinstance(prompt, str) and isinstance(completion, str):
            if self.completion != "response":
                return prompt, completion
            # A text beside a `response` is what a user said, not the beginning of a document.
            return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        if isinstance(prompt, str) or prompt is None:
            found = "null" if prompt is None or completion is None else "a text beside a list of messages"
            raise DialogueError(f"{self.prompt} and {self.completion} must be two texts or two lists; found {found}")
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return template_messages(self.prompt, prompt), template_messages(self.completion, completion)


def _loaded(column: str, value: Any) -> Any:
    """Messages that may be written as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DialogueError(f"{column} is text, but no JSON") from None


def open_examples(
    data: str,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> ExampleSource:
    """Open given responses.

    Args:
        data: .jsonl or .json (.gz as well), .parquet or .arrow, a directory of such files, or a hub id.
        prompt: name of the column with the prompt; None for `prompt` or `messages`.
        completion: name of the column with the response; None for `completion`, `response`, or the last message.
        split: to read, where there are several.
        limit: only the first rows.

    Raises:
        DataError: there is nothing at `data`.
        DataFormatError: empty or damaged files, or no such columns.
        MissingDependencyError: a hub id without the package `datasets`.
    """
    tables = [table for table in open_tables(data, split) if table.rows]
    if not tables:
        raise DataFormatError(f"{data} is empty: it holds no rows")
    common = [column for column in tables[0].columns if all(column in table.columns for table in tables)]
    answers = [completion] if completion is not None else [name for name in _COMPLETIONS if name in common]
    # Rollouts have both messages and, where a user made them, a prompt: the conversation says more.
    asked = [prompt] if prompt is not None else [
        name for name in (("messages", "prompt") if "response" in answers[:1] else ("prompt", "messages"))
        if name in common
    ]  # fmt: skip
    absent = [name for name in (*asked, *answers) if name not in common]
    if absent or not asked or (not answers and asked[0] != "messages"):
        raise DataFormatError(
            f"{data} has no {'column ' + repr(absent[0]) if absent else 'given responses'}; expected the columns "
            "'prompt' and 'completion', or 'messages', alone or with 'response'; columns found: "
            f"{', '.join(tables[0].columns)}"
        )
    return ExampleSource(tables, _Columns(prompt=asked[0], completion=answers[0] if answers else None), limit)
