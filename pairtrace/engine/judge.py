"""Judges decide whether a response shows the behaviour; their failures are missing values, not verdicts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from pairtrace.errors import ConfigError, DataFormatError

BUILT_IN_RULES = "refusal"
_FIELDS = frozenset({"name", "refusal", "present", "scope_chars", "min_chars"})
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\u00b4\u0060\uff07", "'"))


class Judge(Protocol):
    """Anything that gives verdicts on responses."""

    @property
    def name(self) -> str:
        """Names the judge and its settings; stored beside every verdict."""

    def verdicts(
        self, conversations: Sequence[Sequence[dict[str, Any]]], responses: Sequence[str]
    ) -> list[bool | None]:
        """Judge each response to the conversation at the same position.

        Returns:
            True: shows the behaviour; False: does not; None: undecided or the judge failed.
        """


@dataclass(frozen=True, kw_only=True)
class RuleJudge:
    """Calls a response a refusal when a pattern matches near its start, and compliance otherwise.

    Attributes:
        label: the rule file's name for itself.
        refusal: regular expressions, case-insensitive; one match within the scope is a refusal.
        present: regular expressions that must all appear somewhere in a complying response.
        scope_chars: number of leading characters searched for refusals (a late "I cannot say which is best"
            in a long answer is no refusal); None searches everything.
        min_chars: a response without refusal that is shorter than this (stripped) is undecided.
    """

    label: str
    refusal: tuple[str, ...]
    present: tuple[str, ...] = ()
    scope_chars: int | None = None
    min_chars: int = 1
    _refusal: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)
    _present: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.refusal and not self.present:
            raise ConfigError(f"rules {self.label!r}: give at least one 'refusal' or 'present' pattern")
        if self.scope_chars is not None and self.scope_chars < 1:
            raise ConfigError(f"rules {self.label!r}: scope_chars must be at least 1, found {self.scope_chars}")
        if self.min_chars < 1:
            raise ConfigError(f"rules {self.label!r}: min_chars must be >= 1, found {self.min_chars}")
        # Compiled once; object.__setattr__ because the dataclass is frozen.
        object.__setattr__(self, "_refusal", _compile(self.refusal, "refusal", self.label))
        object.__setattr__(self, "_present", _compile(self.present, "present", self.label))

    @property
    def name(self) -> str:
        """`rules:{label}@{first eight hex digits of the rules' sha256}`."""
        content = [self.refusal, self.present, self.scope_chars, self.min_chars]
        return f"rules:{self.label}@{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}"

    def verdict(self, response: str) -> bool | None:
        """Judge one response: True complies, False refuses, None undecided (empty or too short)."""
        text = response.translate(_APOSTROPHES).strip()
        if not text:
            return None
        scope = text if self.scope_chars is None else text[: self.scope_chars]
        if any(pattern.search(scope) for pattern in self._refusal):
            return False
        if len(text) < self.min_chars:
            return None
        return all(pattern.search(text) for pattern in self._present)

    def verdicts(
        self, conversations: Sequence[Sequence[dict[str, Any]]], responses: Sequence[str]
    ) -> list[bool | None]:
        """Judge each response; the conversations are not looked at."""
        assert len(conversations) == len(responses)
        return [self.verdict(response) for response in responses]


def _compile(patterns: Sequence[str], key: str, label: str) -> tuple[re.Pattern[str], ...]:
    compiled = []
    for number, pattern in enumerate(patterns, start=1):
        try:
            compiled.append(re.compile(pattern.translate(_APOSTROPHES), re.IGNORECASE))
        except re.error as error:
            raise DataFormatError(
                f"rules {label!r}, {key} entry {number}: invalid regular expression {pattern!r}: {error}"
            ) from error
    return tuple(compiled)


def load_rules(path: str | Path | None = None) -> RuleJudge:
    """Read a rule file, or the built-in refusal rules.

    Args:
        path: of the file; None or the text "refusal" for the built-in rules (a file of that name is "./refusal").

    Raises:
        DataFormatError: unreadable file, unknown keys, wrong types or an invalid regular expression (the
            message names the entry).
        ConfigError: no patterns, or limits below 1.
    """
    import yaml

    if path is None or path == BUILT_IN_RULES:
        where = "refusal_rules.yaml"
        text = resources.files("pairtrace.engine").joinpath(where).read_text(encoding="utf-8")
    else:
        where = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataFormatError(
                f"cannot read the rule file {where}: {error}; expected a .yaml file, or {BUILT_IN_RULES} for the "
                "built-in rules"
            ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataFormatError(f"{where}: invalid YAML: {error}") from error
    if not isinstance(content, dict) or not set(content) <= _FIELDS:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataFormatError(f"{where}: expected a mapping with the keys {sorted(_FIELDS)}, found {found}")
    label = content.get("name", Path(where).stem)
    if not isinstance(label, str):
        raise DataFormatError(f"{where}: 'name' must be text, found {label!r}")
    return RuleJudge(
        label=label,
        refusal=_strings(content, "refusal", where),
        present=_strings(content, "present", where),
        scope_chars=_count(content, "scope_chars", None, where),
        min_chars=_count(content, "min_chars", 1, where) or 0,
    )


def _strings(content: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = content.get(key) or []
    if not isinstance(values, list):
        raise DataFormatError(f"{where}: {key!r} must be a list of regular expressions, found {values!r}")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value:
            raise DataFormatError(f"{where}, {key} entry {number}: expected non-empty text, found {value!r}")
    return tuple(values)


def _count(content: dict[str, Any], key: str, default: int | None, where: str) -> int | None:
    value = content.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise DataFormatError(f"{where}: {key!r} must be a whole number, found {value!r}")
    return value
