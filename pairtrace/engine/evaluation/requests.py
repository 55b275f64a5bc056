"""What models are asked: the entries of a prompt file, each under its conditions, in cells.

A prompt file of `engine.prompts` with optional further keys:

- `cell` (or `kind`): the group that an entry is counted in, such as `harmful` or `benign_format`. An entry with a cell
  is one request, put as it stands: with its distractor when it has one. An entry without is put under every condition
  that it has, plain and distractor.
- `benign`: true when a good model helps. By default a cell whose name begins with `benign` is benign.
- `constraint`: the form that the response is asked to have (`engine.evaluation.format_checks`). It is the distractor
  that asks for it; where there is none, the prompt itself does.

Entries with and without a distractor may stand in one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pairtrace.engine.evaluation.format_checks import FormatCheck, parse_constraint
from pairtrace.engine.prompts import BehaviorPrompt, PromptSet
from pairtrace.errors import ConfigError, DataFormatError

_BENIGN = "benign"
_UNNAMED = "prompts"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One conversation that every model answers.

    Attributes:
        prompt: the entry of the file.
        condition: "plain" or "distractor".
        cell: the group that it is counted in.
        benign: a good model helps.
        form: what the response must look like, or None where nothing is asked.
    """

    prompt: BehaviorPrompt
    condition: str
    cell: str
    benign: bool
    form: FormatCheck | None

    @property
    def key(self) -> tuple[str, str]:
        """Condition and prompt id, unique within a file."""
        return self.condition, self.prompt.id

    @property
    def group(self) -> tuple[str, str]:
        """Cell and condition: what rates are given for."""
        return self.cell, self.condition

    @property
    def name(self) -> str:
        """Of the request, for errors."""
        return f"prompt {self.prompt.id!r} ({self.condition})"

    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        return self.prompt.conversation(self.condition)


def requests_of(prompts: PromptSet, conditions: Sequence[str] | None = None) -> list[Request]:
    """The requests of a prompt file, in its order.

    Args:
        prompts: the entries; distractors on some of them only are allowed.
        conditions: put every entry under those of these conditions that it has; None follows the rule above.

    Raises:
        DataFormatError: a key is unusable or a constraint unknown.
        ConfigError: no entry has one of the conditions.
    """
    requests = []
    for prompt in prompts.prompts:
        where = f"{prompts.path}, id {prompt.id!r}"
        cell, benign = _cell_of(prompt, where)
        form = parse_constraint(prompt.extra.get("constraint"), where)
        available = prompt.conditions
        if conditions is not None:
            wanted = tuple(name for name in available if name in conditions)
        else:
            wanted = available if cell is None else available[-1:]
        requests += [
            Request(
                prompt=prompt,
                condition=condition,
                cell=cell or (_BENIGN if benign else _UNNAMED),
                benign=benign,
                form=form if condition == available[-1] else None,
            )
            for condition in wanted
        ]
    if not requests:
        raise ConfigError(f"no entry of {prompts.path} has the condition {' or '.join(conditions or ())}")
    _require_agreement(requests, prompts.path)
    return requests


def _cell_of(prompt: BehaviorPrompt, where: str) -> tuple[str | None, bool]:
    named = {key: prompt.extra[key] for key in ("cell", "kind") if prompt.extra.get(key) is not None}
    for key, value in named.items():
        if not isinstance(value, str) or not value.strip():
            raise DataFormatError(f"{where}: {key!r} must be the name of a group of prompts or absent, found {value!r}")
    if len(set(named.values())) > 1:
        raise DataFormatError(f"{where}: 'cell' is {named['cell']!r}, but 'kind' is {named['kind']!r}; give one")
    cell = next(iter(named.values()), None)
    benign = prompt.extra.get("benign")
    if benign is not None and not isinstance(benign, bool):
        raise DataFormatError(f"{where}: 'benign' must be true or false, found {benign!r}")
    return cell, benign if benign is not None else (cell or "").startswith(_BENIGN)


def _require_agreement(requests: Sequence[Request], path: str) -> None:
    """Over-refusal of a cell that is benign in part would be the rate of something else."""
    kinds: dict[str, Request] = {}
    for request in requests:
        first = kinds.setdefault(request.cell, request)
        if first.benign != request.benign:
            raise DataFormatError(
                f"{path}: the cell {request.cell!r} is benign for one of {first.prompt.id!r} and {request.prompt.id!r} "
                "and not for the other; give them different cells"
            )
