"""A preference pair as the engine sees it, before it is rendered to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One chat message: `role`, usually `content`, sometimes `tool_calls` and other keys for the template."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the data, in the form in which TRL's DPO trainer tokenises it.

    The prompt is explicit here, even where the file holds it implicitly. Text pairs hold three strings,
    conversational pairs three lists of messages.

    Attributes:
        row: row number in the data, from 0.
        prompt: the shared prompt; `None` only when `problem` is set.
        chosen: the preferred response, without the prompt.
        rejected: the other response, without the prompt.
        source: name of the data set that the row came from, "" when unknown.
        tools: JSON schemas of the tools that the template is given, or `None`.
        chat_template_kwargs: further variables for the template, or `None`.
        problem: why this row cannot be used; "" for a good row. A row with a problem has empty sides.
    """

    row: int
    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]
    source: str = ""
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    problem: str = ""

    @property
    def conversational(self) -> bool:
        """Whether the sides are lists of messages rather than text."""
        return isinstance(self.prompt, list)
