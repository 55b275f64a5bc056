"""Chat templates: read from a file, freed from the calendar, and applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pairtrace.errors import ConfigError, ModelError

# Templates such as Llama 3.2's print the day: strftime_now("%d %b %Y").
_PRINTS_DATE = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_ANY_CALL = re.compile(r"strftime_now\s*\(")


class TemplateRefusal(Exception):  # noqa: N818 - it never reaches a user
    """A template raised for one conversation; the text says what."""


def apply_template(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    generation_prompt: bool,
    name: str = "the chat template",
    tools: list[Any] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: a transformers tokenizer.
        messages: the conversation.
        generation_prompt: end with the beginning of an answer.
        name: what to call the template in a message.
        tools: what the template may list.
        variables: further variables of the template; `chat_template` replaces the tokenizer's own.

    Raises:
        ModelError: the template is not valid Jinja.
        TemplateRefusal: it raised for this conversation (raise_exception(), undefined variables, wrong types).
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=generation_prompt, **variables
        )
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"{name} is not valid Jinja (line {error.lineno}): {error.message}") from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A template may repeat the conversation's text, which need not be valid Unicode.
        detail = str(error).encode("utf-8", "backslashreplace").decode()
        raise TemplateRefusal(f"{type(error).__name__}: {detail}") from error
    assert isinstance(text, str)
    return text


def chat_template_of(tokenizer: Any, path: str | None = None, day: str | None = None) -> str | None:
    """The chat template to render with, when it is not simply the tokenizer's own.

    A template that prints today's date would give other tokens tomorrow: a resumed store would mix two prompts, and
    a behaviour would be read through another prompt than the data. Its date has to be the one of training.

    Args:
        tokenizer: a transformers tokenizer.
        path: file with a template that replaces the tokenizer's own, or None.
        day: the date to print, as YYYY-MM-DD, or None.

    Returns:
        The text of the template from the file, with its date pinned; None for the tokenizer's own as it is.

    Raises:
        ConfigError: the file cannot be read, or the day is not a date.
        ModelError: the template prints the date and no day was given, or it does so in a way that cannot be pinned.
    """
    own = tokenizer.chat_template
    text = own.get("default") if isinstance(own, dict) else own
    if path is not None:
        text = _read(path)
    if text is None or not _ANY_CALL.search(text):
        return text if path is not None else None
    if day is None:
        raise ModelError(
            "the chat template prints today's date, so the tokens would change from day to day; "
            "give the date of training with --template-date YYYY-MM-DD"
        )
    try:
        moment = date.fromisoformat(day)
    except ValueError:
        raise ConfigError(f"--template-date is {day!r}; expected YYYY-MM-DD") from None
    pinned = _PRINTS_DATE.sub(lambda call: repr(moment.strftime(call["format"])), text)
    if _ANY_CALL.search(pinned):
        raise ModelError(
            "the chat template computes its date in a way that cannot be pinned; give a copy without strftime_now "
            "with --chat-template FILE"
        )
    return pinned


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from error
