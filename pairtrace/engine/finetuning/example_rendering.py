"""From given responses to token ids, exactly as TRL's SFT trainer makes them.

The rules follow `SFTTrainer._prepare_dataset` of TRL 1.16 for rows with a prompt and a completion, whose loss is on the
completion alone: the chat template with generation prompt for the prompt (a text gets the end-of-sequence token), the
completion from where the tokens of prompt and prompt + completion first differ, and one cut to the longest length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pairtrace.engine.finetuning.examples import Example, ExampleSource
from pairtrace.engine.progress import NULL_PROGRESS, Progress
from pairtrace.engine.rendered import Quarantined
from pairtrace.engine.rendering import Renderer, common_prefix, is_blank
from pairtrace.engine.templates import TemplateRefusal, apply_template
from pairtrace.errors import DataError, ModelError

_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RenderedExample:
    """A given response as tokens.

    Attributes:
        row: row number in the data.
        ids: int32 [T], prompt and completion after truncation.
        start: first position with loss, at least 1: the first token of a sequence is predicted by nothing.
    """

    row: int
    ids: np.ndarray
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleRows:
    """The rendered data.

    Attributes:
        examples: the rows to train on, in their order.
        dropped: the others, with their reasons.
    """

    examples: list[RenderedExample]
    dropped: list[Quarantined]

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason code, most frequent first."""
        return dict(Counter(row.code for row in self.dropped).most_common())

    def dropped_records(self) -> list[dict[str, Any]]:
        """Row and reason of every dropped row."""
        return [{"row": row.row, "reason": row.reason} for row in self.dropped]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every sequence, and those with loss: int64 [N, 1] each."""
        tokens = [[len(example.ids)] for example in self.examples]
        responses = [[len(example.ids) - example.start] for example in self.examples]
        return np.array(tokens, dtype=np.int64), np.array(responses, dtype=np.int64)


def render_examples(renderer: Renderer, examples: Sequence[Example]) -> list[RenderedExample | Quarantined]:
    """Render given responses; one result per example, in order, independent of the others.

    Args:
        renderer: of pairs; its tokenizer, template and truncation are used.
        examples: any number.

    Raises:
        ModelError: the tokenizer lacks a chat template or an end-of-sequence token that the examples need.
    """
    return [_render(renderer, example) for example in examples]


def _render(renderer: Renderer, example: Example) -> RenderedExample | Quarantined:
    def quarantined(reason: str) -> Quarantined:
        return Quarantined(row=example.row, source="", reason=reason)

    if example.problem:
        return quarantined(f"malformed_row: {example.problem}")
    if is_blank(example.completion):
        return quarantined("empty_response: the completion is empty")
    try:
        prompt, whole = _texts(renderer, example)
        (prompt + whole).encode()
    except TemplateRefusal as error:
        return quarantined(f"template_error: {error}")
    except UnicodeEncodeError as error:
        return quarantined(f"malformed_row: the text is not valid Unicode ({error.reason})")
    # The template has written the special tokens already; plain text gets those that the tokenizer adds.
    special = isinstance(example.prompt, str)
    encoded = renderer.tokenizer(text=[prompt, whole], add_special_tokens=special, verbose=False)["input_ids"]
    prompt_ids, ids = (np.asarray(one, dtype=np.int32) for one in encoded)
    boundary = common_prefix(prompt_ids, ids)
    cut = 0 if renderer.max_length is None else max(0, len(ids) - renderer.max_length)
    if cut and renderer.truncation == "keep_end":
        ids, boundary = ids[cut:].copy(), boundary - cut
    elif cut:
        ids = ids[: renderer.max_length].copy()
    start = max(boundary, 1)
    if start >= len(ids):
        longest = f", max_length is {renderer.max_length}" if cut else ""
        return quarantined(f"no_loss_tokens: the prompt has {len(prompt_ids)} tokens{longest}")
    return RenderedExample(row=example.row, ids=ids, start=start)


def _texts(renderer: Renderer, example: Example) -> tuple[str, str]:
    """The texts of the prompt, and of prompt and completion."""
    prompt, completion = example.prompt, example.completion
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        end = renderer.tokenizer.eos_token
        if end is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, which the trainer appends to every plain-text "
                "completion; set eos_token in the tokenizer's tokenizer_config.json"
            )
        return prompt, prompt + (completion if completion.endswith(end) else completion + end)
    assert isinstance(prompt, list) and isinstance(completion, list)
    if not (renderer.chat_template or renderer.tokenizer.chat_template):
        raise ModelError(
            "the responses are conversations, but the tokenizer has no chat template; give the one that training "
            "used with --chat-template FILE"
        )
    variables: dict[str, Any] = {} if renderer.chat_template is None else {"chat_template": renderer.chat_template}
    return (
        apply_template(renderer.tokenizer, prompt, generation_prompt=True, **variables),
        apply_template(renderer.tokenizer, prompt + completion, generation_prompt=False, **variables),
    )


def read_example_rows(
    source: ExampleSource, renderer: Renderer, leave_out: Iterable[Quarantined], progress: Progress = NULL_PROGRESS
) -> ExampleRows:
    """Render all rows; they stay in memory, at 4 bytes per token.

    Args:
        source: the data.
        renderer: of pairs.
        leave_out: rows that are not to be trained on, with their reasons.
        progress: counts rows.

    Raises:
        DataError: no row can be used.
        ModelError: see `render_examples`.
    """
    refused = {row.row: row for row in leave_out}
    examples: list[RenderedExample] = []
    dropped: list[Quarantined] = []
    progress.start("read responses", source.rows, "rows")
    rows = source.read()
    while block := list(islice(rows, _BLOCK)):
        for result in render_examples(renderer, block):
            if isinstance(result, RenderedExample) and result.row not in refused:
                examples.append(result)
            else:
                dropped.append(refused[result.row] if isinstance(result, RenderedExample) else result)
        progress.advance(len(block))
    progress.finish()
    found = ExampleRows(examples=examples, dropped=dropped)
    if not examples:
        first = f"; row {dropped[0].row}: {dropped[0].reason}" if dropped else ""
        counted = ", ".join(f"{count:,} {reason}" for reason, count in found.reasons.items())
        raise DataError(f"none of the {source.rows:,} rows can be trained on ({counted}){first}")
    return found
