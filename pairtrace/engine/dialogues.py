"""Conversations in their several spellings, as lists of messages with `role` and `content`."""

from __future__ import annotations

import re
from typing import Any

from pairtrace.engine.pair import Message

_HH_TURN = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|\Z)")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

# A function call is what the model says, so it is an assistant message; its text is kept as it stands.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class DialogueError(ValueError):
    """A conversation cannot be read; the message says what is wrong with it."""


def hh_messages(column: str, text: Any) -> list[Message]:
    r"""Read an HH-RLHF dialogue, "\n\nHuman: ...\n\nAssistant: ...".

    Turns keep their text as it stands, white space included, as in TRL's own converter.

    Args:
        column: where the text comes from, for messages.
        text: the dialogue.

    Raises:
        DialogueError: not text, text before the first turn, or the last turn is not the assistant's.
    """
    if not isinstance(text, str):
        raise DialogueError(f"{column} is {type(text).__name__}, expected a text dialogue")
    before, *turns = _HH_TURN.split(text)
    if not turns:
        raise DialogueError(f"{column} has no turn that begins with '\\n\\nHuman:' or '\\n\\nAssistant:'")
    if before.strip():
        raise DialogueError(f"{column} has text before its first turn")
    messages = [
        {"role": _HH_ROLES[speaker], "content": content}
        for speaker, content in zip(turns[0::2], turns[1::2], strict=True)
    ]
    if messages[-1]["role"] != "assistant":
        raise DialogueError(f"{column} does not end with an Assistant turn")
    return messages


def sharegpt_messages(column: str, value: Any) -> list[Message]:
    """Read ShareGPT messages, `from` and `value`; messages with `role` and `content` may stand among them.

    Args:
        column: where the value comes from, for messages.
        value: one message, a list of messages, or text (an assistant message).

    Raises:
        DialogueError: a message lacks its keys, has an unknown role or a value that is not text.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = []
    for number, message in enumerate(_message_list(column, value), start=1):
        speaker = message.get("from", message.get("role"))
        role = _SHAREGPT_ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            raise DialogueError(f"message {number} of {column} has the unknown role {speaker!r}")
        content = message.get("value", message.get("content"))
        if not isinstance(content, str):
            raise DialogueError(f"message {number} of {column} has no text")
        messages.append({"role": role, "content": content})
    return messages


def template_messages(column: str, value: Any) -> list[Message]:
    """Read messages with `role` and `content` as they stand; which roles exist is for the chat template to say.

    Keys without a value are left out: Arrow fills in every key that any message of the data set has.

    Args:
        column: where the value comes from, for messages.
        value: one message or a list of messages.

    Raises:
        DialogueError: a message has no role, or neither content nor tool calls.
    """
    messages = []
    for number, given in enumerate(_message_list(column, value), start=1):
        message = {key: item for key, item in given.items() if item is not None}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise DialogueError(f"message {number} of {column} has no role")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise DialogueError(f"message {number} of {column} has no content")
        messages.append(message)
    return messages


def _message_list(column: str, value: Any) -> list[dict[str, Any]]:
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise DialogueError(f"{column} is {type(value).__name__}, expected a list of messages")
    if not messages:
        raise DialogueError(f"{column} is an empty list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DialogueError(f"message {number} of {column} is {type(message).__name__}, expected a mapping")
    return messages
