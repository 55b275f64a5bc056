"""Formats of preference data, and how a row of each becomes a pair.

| format | prompt column | chosen and rejected |
|---|---|---|
| standard | text | text, the response alone |
| standard-implicit | none | text, prompt and response in one |
| conversational | messages | messages, the response alone |
| conversational-implicit | none | messages, the whole conversation |
| ultrafeedback | text, not used | messages, the whole conversation |
| hh-rlhf | none | text, "\\n\\nHuman: ...\\n\\nAssistant: ..." |
| sharegpt | messages with `from` and `value` | one such message, a list of them, or text |

An implicit prompt is taken out exactly as `trl.data_utils.extract_prompt` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pairtrace.engine.dialogues import DialogueError, hh_messages, sharegpt_messages, template_messages
from pairtrace.engine.pair import Message, Pair

FORMATS: dict[str, str] = {
    "standard": "text, explicit prompt",
    "standard-implicit": "text, implicit prompt",
    "conversational": "messages, explicit prompt",
    "conversational-implicit": "messages, implicit prompt",
    "ultrafeedback": "messages that include the prompt, beside a prompt column that is not used",
    "hh-rlhf": "text dialogues, implicit prompt",
    "sharegpt": "messages with from and value",
}
"""Every format with its description."""

IGNORES_PROMPT = frozenset(("standard-implicit", "conversational-implicit", "ultrafeedback", "hh-rlhf"))
"""Formats that take the prompt out of the responses, whatever else the data has."""


class _RowError(ValueError):
    """A row cannot be normalised; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """A recognised format with the columns that it reads.

    Attributes:
        name: one of `FORMATS`.
        prompt: prompt column, or `None` when the format has none.
        chosen: column of the preferred response.
        rejected: column of the other response.
        source: column that names the data set of a row, or `None`.
        extras: further columns that rendering honours, those present of `tools`, `chat_template_kwargs`, `system`.
    """

    name: str
    prompt: str | None
    chosen: str
    rejected: str
    source: str | None
    extras: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str | None]:
        """The role of each column, as the manifest of a store records it."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected, "source": self.source}

    @property
    def needed(self) -> list[str]:
        """Names of all columns to read, without repetition."""
        named = (self.prompt, self.chosen, self.rejected, self.source, *self.extras)
        return list(dict.fromkeys(name for name in named if name is not None))

    def normalise(self, row: int, record: Mapping[str, Any], source: str = "") -> Pair:
        """Turn one record into a pair; what does not fit becomes a pair with a `problem`.

        Args:
            row: row number in the data.
            record: values of the columns in `needed`.
            source: source of the row when the format has no source column.
        """
        source = self.source_of(record, source)
        try:
            prompt, chosen, rejected = self._sides(record)
            tools, variables = self._extras(record)
        except (_RowError, DialogueError) as error:
            return Pair(row, None, "", "", source, problem=str(error))
        return Pair(row, prompt, chosen, rejected, source, tools, variables)

    def source_of(self, record: Mapping[str, Any], default: str) -> str:
        """The source that a record names, "" for null, or the default where the format has no source column."""
        if self.source is None:
            return default
        value = record.get(self.source)
        # A lone surrogate can come out of a JSON escape, but cannot be written anywhere.
        return "" if value is None else str(value).encode("utf-8", "replace").decode()

    def _sides(self, record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        chosen, rejected = _value(record, self.chosen), _value(record, self.rejected)
        if self.name in ("standard", "standard-implicit"):
            _require_text(self.chosen, chosen)
            _require_text(self.rejected, rejected)
            if self.prompt is None or self.name == "standard-implicit":
                return _extract_text_prompt(chosen, rejected)
            prompt = _value(record, self.prompt)
            _require_text(self.prompt, prompt)
            return prompt, chosen, rejected
        if self.name == "hh-rlhf":
            return _extract_message_prompt(hh_messages(self.chosen, chosen), hh_messages(self.rejected, rejected))
        convert = sharegpt_messages if self.name == "sharegpt" else template_messages
        chosen, rejected = convert(self.chosen, chosen), convert(self.rejected, rejected)
        if self.prompt is None or self.name in IGNORES_PROMPT:
            return _extract_message_prompt(chosen, rejected)
        prompt = convert(self.prompt, _value(record, self.prompt))
        system = record.get("system") if "system" in self.extras else None
        if isinstance(system, str) and system.strip() and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
        return prompt, chosen, rejected

    def _extras(self, record: Mapping[str, Any]) -> tuple[list[Any] | None, dict[str, Any] | None]:
        tools, variables = record.get("tools"), record.get("chat_template_kwargs")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) if tools.strip() else None
            except json.JSONDecodeError as error:
                raise _RowError(f"tools is not valid JSON: {error}") from error
        if tools is not None and not isinstance(tools, list):
            raise _RowError(f"tools is {kind_name(tools)}, expected a list")
        if variables is not None and not isinstance(variables, dict):
            raise _RowError(f"chat_template_kwargs is {kind_name(variables)}, expected a mapping")
        return tools, variables


def kind_name(value: Any) -> str:
    """What to call the type of a cell in a message."""
    if value is None:
        return "null"
    return {"str": "text", "dict": "a mapping", "list": "a list"}.get(type(value).__name__, type(value).__name__)


def _value(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    if value is None:
        raise _RowError(f"{column} is null")
    return value


def _require_text(column: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _RowError(f"{column} is {kind_name(value)}, expected text")


def text_divergence(chosen: str, rejected: str) -> int:
    """First index at which two texts differ, or the length of the shorter one."""
    same, end = 0, min(len(chosen), len(rejected))
    while same < end:  # bisect: comparing slices is much faster than comparing characters
        middle = (same + end + 1) // 2
        if chosen[same:middle] == rejected[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same


def _extract_text_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """TRL's `extract_prompt` on text, with what it does to a space before the divergence.

    At index 0 TRL looks at the last character: a chosen text that ends with a space is then split there. That is
    reproduced, because the trainer trains on it.
    """
    if not chosen or not rejected:
        raise _RowError(f"{'chosen' if not chosen else 'rejected'} is empty text, so it holds no prompt")
    index = text_divergence(chosen, rejected)
    one_begins_with_the_other = index == min(len(chosen), len(rejected))  # TRL then leaves the last character over
    if one_begins_with_the_other or chosen[index - 1] == " ":
        index -= 1
    return chosen[:index], chosen[index:], rejected[index:]


def _extract_message_prompt(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    length = min(len(chosen), len(rejected))
    index = next((index for index in range(length) if chosen[index] != rejected[index]), length - 1)
    if index == 0:
        raise _RowError("chosen and rejected share no message that could be the prompt")
    return chosen[:index], chosen[index:], rejected[index:]
