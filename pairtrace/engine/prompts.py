"""Behaviour prompts: the requests on which the two checkpoints are compared.

A file is YAML (a list of mappings) or JSON lines. Every entry has an `id`, a `prompt` (text) or `messages` (a
conversation that ends with the user), and optionally a `distractor` that is appended to the last user
message. Other keys are kept and ignored.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairtrace.errors import DataFormatError

PLAIN = "plain"
DISTRACTOR = "distractor"
_OWN_KEYS = frozenset({"id", "prompt", "messages", "distractor"})
_NAMED_IDS = 5


@dataclass(frozen=True, kw_only=True)
class BehaviorPrompt:
    """One scenario.

    Attributes:
        id: unique within the file.
        messages: the plain conversation; each has at least `role` and `content`, the last is the user's.
        distractor: text appended to the last user message under the distractor condition, or None.
        extra: the entry's other keys, untouched.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    distractor: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions under which this prompt can be sent: plain, and distractor where it has one."""
        return (PLAIN,) if self.distractor is None else (PLAIN, DISTRACTOR)

    def conversation(self, condition: str) -> list[dict[str, Any]]:
        """The messages to send under `condition` ("plain" or "distractor"), as fresh dicts.

        The distractor is separated from the request by one space unless it begins with whitespace itself.
        """
        messages = [dict(message) for message in self.messages]
        if condition == PLAIN:
            return messages
        assert condition == DISTRACTOR and self.distractor is not None, (condition, self.id)
        separator = "" if self.distractor[0].isspace() else " "
        messages[-1]["content"] += separator + self.distractor
        return messages


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """The prompts of one file.

    Attributes:
        prompts: in file order, at least one.
        path: where they came from.
        fingerprint: sha256 over ids, messages and distractors (not over extra keys), hex.
    """

    prompts: tuple[BehaviorPrompt, ...]
    path: str
    fingerprint: str

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions these prompts allow: plain, and distractor where there are distractors."""
        return tuple(condition for condition in (PLAIN, DISTRACTOR) if self.under(condition))

    def under(self, condition: str) -> tuple[BehaviorPrompt, ...]:
        """The prompts that can be sent under a condition, in file order."""
        return tuple(prompt for prompt in self.prompts if condition in prompt.conditions)

    def by_id(self) -> dict[str, BehaviorPrompt]:
        """The prompts keyed by id."""
        return {prompt.id: prompt for prompt in self.prompts}


def load_prompts(path: str | Path, *, mixed: bool = False) -> PromptSet:
    """Read and check a prompt file.

    Args:
        path: `.yaml`, `.yml`, `.jsonl` or `.jsonl.gz`.
        mixed: allow distractors on some prompts only.

    Returns:
        The prompts, in file order.

    Raises:
        DataFormatError: unreadable, empty or malformed file, duplicate ids, distractors on some prompts only.
    """
    path = Path(path)
    prompts: list[BehaviorPrompt] = []
    places: dict[str, str] = {}
    for place, entry in _entries(path):
        prompt = _parse(entry, f"{path}, {place}")
        if prompt.id in places:
            raise DataFormatError(
                f"{path}: the id {prompt.id!r} is used twice, by {places[prompt.id]} and by {place}; ids must be unique"
            )
        places[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise DataFormatError(f"{path}: no prompts; expected a list of entries with 'id' and 'prompt'")
    if not mixed:
        _require_agreement(prompts, path)
    content = [[p.id, list(p.messages), p.distractor] for p in prompts]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return PromptSet(prompts=tuple(prompts), path=str(path), fingerprint=digest)


def _require_agreement(prompts: list[BehaviorPrompt], path: Path) -> None:
    without = [p.id for p in prompts if p.distractor is None]
    if 0 < len(without) < len(prompts):
        named = ", ".join(repr(i) for i in without[:_NAMED_IDS])
        more = f" and {len(without) - _NAMED_IDS} more" if len(without) > _NAMED_IDS else ""
        raise DataFormatError(
            f"{path}: {len(prompts) - len(without)} of {len(prompts)} prompts have a distractor; "
            f"{named}{more} have none. Give every prompt a distractor (four conditions) or none of them (two "
            "conditions)"
        )


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place for messages, raw entry) for every entry of the file."""
    if path.is_dir():
        kind = "is a checkpoint" if (path / "config.json").exists() else "is a directory"
        raise DataFormatError(
            f"{path} {kind}; expected a file of prompts, .yaml or .jsonl (as an argument, it comes before the models)"
        )
    suffixes = "".join(path.suffixes).lower()
    try:
        raw = gzip.decompress(path.read_bytes()) if suffixes.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataFormatError(f"cannot read the prompt file {path}: {error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataFormatError(f"{path}, line {line}: invalid UTF-8 ({error.reason}); save the file as UTF-8") from error
    if suffixes.endswith((".jsonl", ".jsonl.gz")):
        yield from _jsonl_entries(text, path)
    elif suffixes.endswith((".yaml", ".yml")):
        yield from _yaml_entries(text, path)
    else:
        raise DataFormatError(f"{path}: prompt files are .yaml, .yml, .jsonl or .jsonl.gz, not {path.suffix!r}")


def _jsonl_entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines: it also splits at U+2028 and others, which are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataFormatError(
                    f"{path}, line {number}: invalid JSON: {error.msg} (column {error.colno})"
                ) from error


def _yaml_entries(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            raise DataFormatError(
                f"{path}: expected a list of mappings (each starting with '- id:'), found {node.tag[18:]}"
            )
        for number, item in enumerate(node.value, start=1):
            place = f"entry {number} (line {item.start_mark.line + 1})"
            yield place, loader.construct_object(item, deep=True)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise DataFormatError(f"{path}, line {line}: invalid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise DataFormatError(f"{path}: invalid YAML: {error}") from error
    finally:
        loader.dispose()


def _parse(entry: Any, where: str) -> BehaviorPrompt:
    if not isinstance(entry, dict):
        raise DataFormatError(f"{where}: expected a mapping with 'id' and 'prompt', found {type(entry).__name__}")
    identifier = entry.get("id")
    if not isinstance(identifier, str) or not identifier:
        raise DataFormatError(f"{where}: 'id' must be non-empty text, found {identifier!r} (quote numbers)")
    where = f"{where}, id {identifier!r}"
    distractor = entry.get("distractor")
    if distractor is not None and (not isinstance(distractor, str) or not distractor.strip()):
        raise DataFormatError(f"{where}: 'distractor' must be non-empty text or absent, found {distractor!r}")
    return BehaviorPrompt(
        id=identifier,
        messages=_parse_messages(entry, where),
        distractor=distractor,
        extra={str(key): value for key, value in entry.items() if key not in _OWN_KEYS},
    )


def _parse_messages(entry: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        found = "both" if prompt is not None else f"keys {sorted(map(str, entry))}"
        empty = [name for name in ("prompt", "messages") if prompt is None and name in entry]
        if empty:
            found += f", but {' and '.join(map(repr, empty))} {'is' if len(empty) == 1 else 'are'} null"
        raise DataFormatError(f"{where}: give either 'prompt' (text) or 'messages' (a list), found {found}")
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataFormatError(f"{where}: 'prompt' must be non-empty text, found {prompt!r}")
        return ({"role": "user", "content": prompt},)
    return check_messages(messages, where)


def check_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Check that `messages` is a conversation that ends with the user.

    Args:
        messages: anything; usually parsed JSON or YAML.
        where: the place named in errors.

    Returns:
        The messages as a tuple of dicts.

    Raises:
        DataFormatError: not a non-empty list of mappings with text in `role` and `content`, or the last
            message is not the user's.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataFormatError(f"{where}: 'messages' must be a non-empty list, found {messages!r}")
    for position, message in enumerate(messages, start=1):
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise DataFormatError(
                f"{where}: message {position} must have text in 'role' and 'content', found {message!r}"
            )
    if messages[-1]["role"] != "user":
        raise DataFormatError(f"{where}: the last message must be the user's, found role {messages[-1]['role']!r}")
    return tuple(dict(message) for message in messages)
