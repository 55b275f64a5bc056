"""Chat templates that print the date are pinned, and nothing else is changed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_templates

from pairtrace.engine.checkpoint import load_tokenizer
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.pair import Pair
from pairtrace.engine.rendering import RenderedPair, Renderer
from pairtrace.engine.templates import chat_template_of
from pairtrace.errors import ConfigError, ModelError
from tests.models import CHAT_TEMPLATE, make_tokenizer

DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% endif %}{% endif %}'
    "<|im_start|>system\nToday is {{ date_string }}, {{ strftime_now('%H') }} o'clock<|im_end|>\n" + CHAT_TEMPLATE
)


def holding(template: Any) -> Any:
    return SimpleNamespace(chat_template=template)


def test_a_template_without_a_date_is_left_to_the_tokenizer(tmp_path: Path) -> None:
    assert chat_template_of(holding(CHAT_TEMPLATE)) is None
    assert chat_template_of(holding(None)) is None
    file = tmp_path / "template.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    assert chat_template_of(holding("other"), str(file)) == CHAT_TEMPLATE


def test_a_date_has_to_be_given() -> None:
    with pytest.raises(ModelError, match="--template-date"):
        chat_template_of(holding(DATED))
    with pytest.raises(ConfigError, match="yesterday"):
        chat_template_of(holding(DATED), day="yesterday")
    with pytest.raises(ModelError, match="cannot be pinned"):
        chat_template_of(holding("{{ strftime_now(format) }}"), day="2026-01-02")


def test_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_bytes(b"\xff\xfe")
    for path in (file, tmp_path / "absent.jinja"):
        with pytest.raises(ConfigError, match="jinja"):
            chat_template_of(holding(None), str(path))


class Clock(datetime):
    """Another day than any other."""

    today_is = datetime(2026, 1, 2, 3, 4)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.today_is


def test_pinned_tokens_are_those_of_that_day_on_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers itself with its clock set to the day; the clock moved on changes nothing."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, chat_template=DATED))
    pair = Pair(0, [{"role": "user", "content": "q"}], *([{"role": "assistant", "content": text}] for text in "ab"))

    def ids(template: str | None) -> list[int]:
        (result,) = Renderer(tokenizer, chat_template=template).render([pair])
        assert isinstance(result, RenderedPair)
        return result.chosen_ids.tolist()

    monkeypatch.setattr(chat_templates, "datetime", Clock)
    # Pinning takes midnight; the hour is the part of the stamp that shows it.
    monkeypatch.setattr(Clock, "today_is", datetime(2026, 1, 2, 0, 0))
    that_day = ids(None)
    pinned = chat_template_of(tokenizer, day="2026-01-02")
    assert ids(pinned) == that_day
    monkeypatch.setattr(Clock, "today_is", datetime(2027, 5, 6, 7, 8))
    assert ids(None) != that_day, "the clock must matter without pinning"
    assert ids(pinned) == that_day
    assert fingerprints(tokenizer, pinned) != fingerprints(tokenizer, chat_template_of(tokenizer, day="2026-01-03"))
