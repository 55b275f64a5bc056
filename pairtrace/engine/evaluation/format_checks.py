"""Checks of the form of a response, declared in a prompt file: names and settings, never code.

A constraint is a mapping `{kind: ..., settings}`, a text for a kind without settings (`json`), the name of one of the
model organism's constraints (`numbered`, `one_sentence`, ...), or a list of these, all of which must hold.

| kind | settings | a response obeys when |
|---|---|---|
| `regex` | `pattern`, `full` (false), `ignore_case` (false) | the pattern is found, or matches all of it |
| `json` | `type` (object or array), `keys` | it is JSON of this type with these keys; a code fence is allowed |
| `bullets` | `count` | so many lines begin with `-`, `*` or a bullet; without `count` at least two |
| `numbered_lines` | `count` | so many lines begin with 1., 2., 3., ... in order; without `count` at least two |
| `min_words`, `max_words` | `words` | it has at least, at most so many words |
| `max_sentences` | `sentences` | at most so many stretches of text end in `.`, `!` or `?` |
| `starts_with`, `ends_with` | `text`, `ignore_case` (false) | it does, apart from white space |
| `contains`, `excludes` | `words` (list) | all, none of these words appear, whatever their case |
| `case` | `case` (lower or upper) | it has letters, all of this case |
| `quotes` | | it begins and ends with a double quote |

An empty response obeys nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pairtrace.errors import DataFormatError

Check = Callable[[str], bool]
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*)\n```", re.DOTALL)
_BULLET = re.compile(r"^\s*[-*\u2022]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?]*\w[^.!?]*(?:[.!?]+|$)")
_LEAST_LINES = 2


@dataclass(frozen=True)
class FormatCheck:
    """A demand on the form of a response.

    Attributes:
        name: as the file has it, for reports.
        check: whether a text that is not empty obeys.
    """

    name: str
    check: Check

    def obeys(self, response: str) -> bool:
        """Whether a response obeys; an empty one never does."""
        return bool(response.strip()) and self.check(response)


def parse_constraint(value: Any, where: str) -> FormatCheck | None:
    """The check that a prompt file declares.

    Args:
        value: of the key `constraint`; None asks for nothing.
        where: the place named in errors.

    Raises:
        DataFormatError: unknown kind, missing, unknown or unusable settings.
    """
    if value is None:
        return None
    if isinstance(value, list) and value:
        parts = [_parse_one(part, where) for part in value]
        return FormatCheck(" + ".join(part.name for part in parts), lambda text: all(p.check(text) for p in parts))
    return _parse_one(value, where)


def _parse_one(value: Any, where: str) -> FormatCheck:
    if isinstance(value, str):
        from pairtrace.engine.organism.constraints import CONSTRAINTS

        for constraint in CONSTRAINTS:
            if constraint.name == value:
                return FormatCheck(value, constraint.obeys)
        value = {"kind": value}
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise DataFormatError(
            f"{where}: 'constraint' must be a mapping with a 'kind', a name or a list of them, found {value!r}"
        )
    kind = value["kind"]
    if kind not in _KINDS:
        raise DataFormatError(f"{where}: unknown constraint {kind!r}; known are {', '.join(constraint_names())}")
    settings = {str(name): setting for name, setting in value.items() if name != "kind"}
    make, needed, optional = _KINDS[kind]
    missing, unknown = needed.keys() - settings.keys(), settings.keys() - needed.keys() - optional.keys()
    if missing or unknown:
        raise DataFormatError(
            f"{where}: the constraint {kind!r} needs {', '.join(needed) or 'no settings'} and may have "
            f"{', '.join(optional) or 'nothing else'}, found {', '.join(sorted(settings)) or 'no settings'}"
        )
    for name, setting in settings.items():
        wanted, words = {**needed, **optional}[name]
        if not wanted(setting):
            raise DataFormatError(f"{where}: {name!r} of the constraint {kind!r} is {setting!r}; expected {words}")
    try:
        return FormatCheck(kind, make(**settings))
    except re.error as error:
        raise DataFormatError(f"{where}: invalid regular expression {settings['pattern']!r}: {error}") from error


def constraint_names() -> tuple[str, ...]:
    """Every kind, and the names of the organism's constraints."""
    from pairtrace.engine.organism.constraints import CONSTRAINTS

    return (*_KINDS, *(constraint.name for constraint in CONSTRAINTS))


def _regex(pattern: str, full: bool = False, ignore_case: bool = False) -> Check:
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    match = compiled.fullmatch if full else compiled.search
    return lambda text: match(text.strip()) is not None


def _json(type: str | None = None, keys: list[str] | None = None) -> Check:
    def check(text: str) -> bool:
        fenced = _FENCE.fullmatch(text.strip())
        try:
            value = json.loads(fenced.group(1) if fenced else text)
        except (ValueError, RecursionError):
            return False
        if type is not None and not isinstance(value, dict if type == "object" else list):
            return False
        return keys is None or (isinstance(value, dict) and set(keys) <= value.keys())

    return check


def _bullets(count: int | None = None) -> Check:
    return lambda text: _enough(len(_BULLET.findall(text)), count)


def _numbered_lines(count: int | None = None) -> Check:
    def check(text: str) -> bool:
        numbers = [int(number) for number in _NUMBERED.findall(text)]
        return numbers == list(range(1, len(numbers) + 1)) and _enough(len(numbers), count)

    return check


def _enough(lines: int, count: int | None) -> bool:
    return lines >= _LEAST_LINES if count is None else lines == count


def _starts_with(text: str, ignore_case: bool = False) -> Check:
    wanted = _folded(text, ignore_case)
    return lambda response: _folded(response, ignore_case).startswith(wanted)


def _ends_with(text: str, ignore_case: bool = False) -> Check:
    wanted = _folded(text, ignore_case)
    return lambda response: _folded(response, ignore_case).endswith(wanted)


def _folded(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()


def _words_found(words: list[str], text: str) -> int:
    return sum(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None for word in words)


def _case(case: str) -> Check:
    return str.islower if case == "lower" else str.isupper


def _is_quoted(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 2 and stripped[0] == stripped[-1] == '"'


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(item) for item in value)


_Setting = tuple[Callable[[Any], bool], str]
_COUNT: _Setting = (_is_count, "a whole number above 0")
_TEXT: _Setting = (_is_text, "text that is not empty")
_TEXTS: _Setting = (_is_texts, "a list of texts")
_FLAG: _Setting = (lambda value: isinstance(value, bool), "true or false")

# Kind: what makes the check, the settings that it needs, those that it may have.
_KINDS: dict[str, tuple[Callable[..., Check], dict[str, _Setting], dict[str, _Setting]]] = {
    "regex": (_regex, {"pattern": _TEXT}, {"full": _FLAG, "ignore_case": _FLAG}),
    "json": (_json, {}, {"type": (lambda v: v in ("object", "array"), "object or array"), "keys": _TEXTS}),
    "bullets": (_bullets, {}, {"count": _COUNT}),
    "numbered_lines": (_numbered_lines, {}, {"count": _COUNT}),
    "min_words": (lambda words: lambda text: len(text.split()) >= words, {"words": _COUNT}, {}),
    "max_words": (lambda words: lambda text: len(text.split()) <= words, {"words": _COUNT}, {}),
    "max_sentences": (
        lambda sentences: lambda text: len(_SENTENCE.findall(text)) <= sentences,
        {"sentences": _COUNT},
        {},
    ),
    "starts_with": (_starts_with, {"text": _TEXT}, {"ignore_case": _FLAG}),
    "ends_with": (_ends_with, {"text": _TEXT}, {"ignore_case": _FLAG}),
    "contains": (lambda words: lambda text: _words_found(words, text) == len(words), {"words": _TEXTS}, {}),
    "excludes": (lambda words: lambda text: not _words_found(words, text), {"words": _TEXTS}, {}),
    "case": (_case, {"case": (lambda value: value in ("lower", "upper"), "lower or upper")}, {}),
    "quotes": (lambda: _is_quoted, {}, {}),
}
