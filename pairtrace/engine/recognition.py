"""Recognising the format of preference data from its columns and first rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pairtrace.engine.formats import FORMATS, IGNORES_PROMPT, RowFormat, kind_name, text_divergence
from pairtrace.errors import ConfigError, DataFormatError

_NEEDS_PROMPT = frozenset(("standard", "conversational"))
_PROMPT_COLUMNS = ("prompt", "conversations")
_SOURCE_COLUMNS = ("source", "dataset", "origin", "data_source")
_UNCLAIMED_PROMPTS = ("question", "instruction", "input", "query", "context", "messages", "text")

_UNDERSTOOD = (
    'one of the forms that pairtrace reads is {"prompt": "...", "chosen": "...", "rejected": "..."}, with text or '
    'with lists of {"role": ..., "content": ...}; say what the columns are with --format '
    f"({', '.join(FORMATS)}), --prompt, --chosen, --rejected and --source"
)

# (kind of chosen and rejected, kind of the prompt column) -> format
_BY_KIND = {
    ("text", "text"): "standard",
    ("text", "absent"): "standard-implicit",
    ("text", "sharegpt"): "sharegpt",
    ("messages", "messages"): "conversational",
    ("messages", "absent"): "conversational-implicit",
    ("messages", "text"): "ultrafeedback",
    ("sharegpt", "sharegpt"): "sharegpt",
    ("sharegpt", "messages"): "sharegpt",
    ("messages", "sharegpt"): "sharegpt",
    ("sharegpt", "absent"): "sharegpt",
}


def recognise(
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    *,
    name: str,
    format: str | None = None,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    source: str | None = None,
) -> RowFormat:
    """Decide the format from the columns and the first rows.

    Args:
        columns: names of all columns.
        sample: the first rows.
        name: what to call the data in messages.
        format: a format by name; `None` to recognise it.
        prompt: prompt column; `None` for the usual names. The same goes for `chosen`, `rejected` and `source`.

    Raises:
        ConfigError: `format` is unknown.
        DataFormatError: a column is missing, or the format is not recognisable or ambiguous.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    found = ", ".join(columns) or "none"
    given = {"--prompt": prompt, "--chosen": chosen, "--rejected": rejected, "--source": source}
    resolved = {**given, "--chosen": chosen or "chosen", "--rejected": rejected or "rejected"}
    for option, column in resolved.items():
        if column is not None and column not in columns:
            advice = "check the option" if given[option] else f"name the column with {option}"
            raise DataFormatError(
                f"{name}: there is no column {column!r} ({advice}); columns found: {found}; {_UNDERSTOOD}"
            )
    chosen, rejected = resolved["--chosen"], resolved["--rejected"]
    assert chosen is not None and rejected is not None
    if prompt is None:
        prompt = next((column for column in _PROMPT_COLUMNS if column in columns), None)
    if source is None:
        source = next((column for column in _SOURCE_COLUMNS if column in columns), None)
    if format is None:
        format = _guess(columns, sample, name, prompt, chosen, rejected)
    if format in _NEEDS_PROMPT and prompt is None:
        raise DataFormatError(
            f"{name}: format {format} needs a prompt column; name it with --prompt; columns found: {found}"
        )
    optional = ("tools", "chat_template_kwargs") + (("system",) if format == "sharegpt" else ())
    return RowFormat(
        name=format,
        prompt=None if format in IGNORES_PROMPT else prompt,
        chosen=chosen,
        rejected=rejected,
        source=source,
        extras=tuple(column for column in optional if column in columns),
    )


def _guess(
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    name: str,
    prompt: str | None,
    chosen: str,
    rejected: str,
) -> str:
    guesses = Counter(guess for record in sample if (guess := _guess_row(record, prompt, chosen, rejected)) is not None)
    found = ", ".join(columns)
    if not guesses:
        first = sample[0] if sample else {}
        kinds = ", ".join(
            f"{column}: {kind_name(first.get(column))}" for column in (prompt, chosen, rejected) if column
        )
        raise DataFormatError(
            f"{name}: the format is not recognisable (first row: {kinds}); columns found: {found}; {_UNDERSTOOD}"
        )
    (best, count), *others = guesses.most_common(2)
    if others and count < 0.9 * guesses.total():
        raise DataFormatError(
            f"{name}: the first {len(sample)} rows look like {best} ({count}) and {others[0][0]} ({others[0][1]}); "
            f"choose with --format; columns found: {found}; {_UNDERSTOOD}"
        )
    if best == "standard-implicit":
        _require_shared_prompts(columns, sample, name, chosen, rejected)
    return best


def _require_shared_prompts(
    columns: Sequence[str], sample: Sequence[Mapping[str, Any]], name: str, chosen: str, rejected: str
) -> None:
    """Refuse to guess an implicit prompt where the texts share none: their prompt is in another column."""
    pairs = [(record.get(chosen), record.get(rejected)) for record in sample]
    texts = [(a, b) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
    shared = sum(" " in a[: text_divergence(a, b)].strip() for a, b in texts)
    if 2 * shared >= len(texts):
        return
    likely = next((column for column in _UNCLAIMED_PROMPTS if column in columns), None)
    hint = f"--prompt {likely}" if likely else "--prompt COLUMN"
    raise DataFormatError(
        f"{name}: chosen and rejected are texts that share no beginning in {len(texts) - shared} of the first "
        f"{len(texts)} rows, so the prompt must be elsewhere; columns found: {', '.join(columns)}; name its "
        f"column with {hint}, or insist on an implicit prompt with --format standard-implicit; {_UNDERSTOOD}"
    )


def _guess_row(record: Mapping[str, Any], prompt: str | None, chosen: str, rejected: str) -> str | None:
    kinds = {_kind(record.get(chosen)), _kind(record.get(rejected))}
    if len(kinds) != 1:
        return None
    side = kinds.pop()
    context = _kind(record.get(prompt)) if prompt is not None else "absent"
    guess = _BY_KIND.get((side, context))
    if guess == "standard-implicit" and str(record[chosen]).startswith("\n\nHuman:"):
        return "hh-rlhf"
    return guess


def _kind(value: Any) -> str:
    """Coarse type of a cell: text, messages (role), sharegpt (from), or other."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        if "role" in first:
            return "messages"
        if "from" in first and "value" in first:
            return "sharegpt"
    return "other"
