"""From pairs to token ids, exactly as TRL's DPO trainer makes them.

The rules follow `DPOTrainer._prepare_dataset` and `DataCollatorForPreference` of TRL 1.16:

- Conversational: the chat template renders the prompt with the generation prompt, and prompt + response
  without it; the text is tokenised without further special tokens.
- Text: the end-of-sequence token is appended to a response that does not end with it already, and the
  tokenizer adds its own special tokens.
- The response begins where the tokens of prompt and prompt + response first differ, the earlier of both sides.
- Each side is then cut to `max_length` tokens.

The loss compares the prediction at position t - 1 with token t: position 0 has none and is never pooled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.pair import Message, Pair
from pairtrace.engine.rendered import Quarantined, RenderedPair, content_id
from pairtrace.engine.templates import TemplateRefusal, apply_template
from pairtrace.errors import ConfigError, ModelError

__all__ = ["TRUNCATIONS", "Quarantined", "RenderedPair", "Renderer", "Truncation", "fingerprints"]

Truncation = Literal["keep_start", "keep_end"]
TRUNCATIONS: tuple[Truncation, ...] = ("keep_start", "keep_end")

# What a template can raise for one odd conversation: raise_exception(), undefined variables, wrong types.

# Arguments of apply_chat_template that change the tokenisation, not the template: a row may not set them.
_NOT_TEMPLATE_VARIABLES = frozenset(
    (
        *("tokenize", "tokenizer_kwargs", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("add_generation_prompt", "continue_final_message"),
    )
)


@dataclass(frozen=True, slots=True)
class _Texts:
    """The three texts of a pair that are to be tokenised; `position` is its place in the batch."""

    position: int
    prompt: str
    prompt_chosen: str
    prompt_rejected: str


class Renderer:
    """Renders pairs to token ids as the DPO trainer does.

    Args:
        tokenizer: a transformers tokenizer, fast or slow. It is not changed.
        max_length: longest sequence (prompt + response) in tokens, at least 2; `None` for no limit.
        truncation: "keep_start" cuts the end of a longer sequence, "keep_end" its beginning.
        chat_template: a Jinja template that replaces the tokenizer's own.

    Raises:
        ConfigError: `max_length` or `truncation` is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = 1024,
        truncation: str = "keep_start",
        chat_template: str | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ConfigError(
                f"max_length is {max_length}, but the first token of a sequence has no loss: give at least 2"
            )
        if truncation not in TRUNCATIONS:
            raise ConfigError(f"truncation is {truncation!r}, expected one of {', '.join(TRUNCATIONS)}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.chat_template = chat_template

    def render(self, pairs: Sequence[Pair]) -> list[RenderedPair | Quarantined]:
        """Render a batch of pairs; one result per pair, in order, independent of the rest of the batch.

        Raises:
            ModelError: the tokenizer lacks a chat template (conversational pairs) or an end-of-sequence token
                (text pairs), or the template is not valid Jinja.
        """
        results: list[RenderedPair | Quarantined | None] = [None] * len(pairs)
        templated: list[_Texts] = []
        plain: list[_Texts] = []
        for position, pair in enumerate(pairs):
            prepared = self._texts(position, pair)
            if isinstance(prepared, str):
                results[position] = Quarantined(row=pair.row, source=pair.source, reason=prepared)
            else:
                (templated if pair.conversational else plain).append(prepared)
        # The template has written the special tokens already; plain text gets those that the tokenizer adds.
        for group, add_special_tokens in ((templated, False), (plain, True)):
            for texts, ids in zip(group, self._tokenize(group, add_special_tokens), strict=True):
                results[texts.position] = self._assemble(pairs[texts.position], *ids)
        rendered = [result for result in results if result is not None]
        assert len(rendered) == len(pairs), "every pair is either rendered or quarantined"
        return rendered

    def _texts(self, position: int, pair: Pair) -> _Texts | str:
        """The texts to tokenise, or the reason why there are none."""
        if pair.problem:
            return f"malformed_row: {pair.problem}"
        sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
        empty = [name for name, response in sides if is_blank(response)]
        if empty:
            return f"empty_response: {' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty"
        prepared = self._apply_template(pair) if pair.conversational else self._append_eos(pair)
        if isinstance(prepared, str):
            return prepared
        try:
            "".join(prepared).encode()
        except UnicodeEncodeError as error:
            return f"malformed_row: the text is not valid Unicode ({error.reason})"
        return _Texts(position, *prepared)

    def _append_eos(self, pair: Pair) -> tuple[str, str, str]:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, which the trainer appends to every plain-text "
                "response; set eos_token in the tokenizer's tokenizer_config.json"
            )
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        assert isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
        chosen, rejected = (side if side.endswith(eos) else side + eos for side in (chosen, rejected))
        return prompt, prompt + chosen, prompt + rejected

    def _apply_template(self, pair: Pair) -> tuple[str, str, str] | str:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
        variables: dict[str, Any] = dict(pair.chat_template_kwargs or {})
        reserved = sorted(_NOT_TEMPLATE_VARIABLES & variables.keys())
        if reserved:
            return f"template_error: chat_template_kwargs may not set {', '.join(reserved)}"
        tools = variables.pop("tools", pair.tools)
        if self.chat_template is not None:
            variables.setdefault("chat_template", self.chat_template)
        if not (variables.get("chat_template") or self.tokenizer.chat_template):
            raise ModelError(
                "the pairs are conversations, but the tokenizer has no chat template; give the one that training "
                "used with --chat-template FILE, or read text data as plain text with --format"
            )
        try:
            return (
                apply_template(self.tokenizer, prompt, generation_prompt=True, tools=tools, **variables),
                apply_template(self.tokenizer, prompt + chosen, generation_prompt=False, tools=tools, **variables),
                apply_template(self.tokenizer, prompt + rejected, generation_prompt=False, tools=tools, **variables),
            )
        except TemplateRefusal as error:
            return f"template_error: {error}"

    def _tokenize(
        self, group: Sequence[_Texts], add_special_tokens: bool
    ) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        if not group:
            return
        texts = [text for item in group for text in (item.prompt, item.prompt_chosen, item.prompt_rejected)]
        # verbose=False: the tokenizer would warn about sequences that the truncation below cuts anyway.
        encoded = self.tokenizer(
            text=texts,
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for first in range(0, len(encoded), 3):
            prompt, chosen, rejected = (np.asarray(ids, dtype=np.int32) for ids in encoded[first : first + 3])
            yield prompt, chosen, rejected

    def _assemble(
        self, pair: Pair, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
    ) -> RenderedPair | Quarantined:
        boundary = _boundary(prompt, chosen, rejected)
        reason = ""
        if self.max_length is not None and self.truncation == "keep_start" and boundary >= self.max_length:
            reason = f"prompt_too_long: the prompt has {boundary} tokens, max_length is {self.max_length}"
        chosen, chosen_start = self._truncate(chosen, boundary)
        rejected, rejected_start = self._truncate(rejected, boundary)
        if not reason:
            bare = [
                name
                for name, ids, start in (
                    ("chosen", chosen, chosen_start),
                    ("rejected", rejected, rejected_start),
                )
                if start >= len(ids)
            ]
            if bare:
                reason = f"no_loss_tokens: no token of {' and '.join(bare)} has loss"
            elif chosen_start == rejected_start and np.array_equal(chosen, rejected):
                reason = "identical: chosen and rejected are the same tokens"
        if reason:
            return Quarantined(row=pair.row, source=pair.source, reason=reason)
        return RenderedPair(
            row=pair.row,
            source=pair.source,
            chosen_ids=chosen,
            rejected_ids=rejected,
            chosen_start=chosen_start,
            rejected_start=rejected_start,
            pair_id=content_id(chosen, chosen_start, rejected, rejected_start),
        )

    def _truncate(self, ids: np.ndarray, boundary: int) -> tuple[np.ndarray, int]:
        """Cut one side to `max_length`; also the first position with loss, which is never 0."""
        cut = 0 if self.max_length is None else max(0, len(ids) - self.max_length)
        if cut and self.truncation == "keep_end":
            return ids[cut:].copy(), max(boundary - cut, 1)
        return (ids[: self.max_length].copy() if cut else ids), max(boundary, 1)


def _boundary(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Number of prompt tokens that both sides begin with: a template or a merge may change the last ones."""
    return min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))


def common_prefix(ids: np.ndarray, others: np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    length = min(len(ids), len(others))
    differs = ids[:length] != others[:length]
    return int(differs.argmax()) if differs.any() else length


def is_blank(response: str | list[Message]) -> bool:
    """Whether a response holds neither text nor a tool call."""
    if isinstance(response, str):
        return not response.strip()
    return all(_is_blank_content(message.get("content")) and not message.get("tool_calls") for message in response)


def _is_blank_content(content: Any) -> bool:
    if isinstance(content, list):  # blocks of content, of which only text can be blank
        return all(
            isinstance(block, dict) and block.get("type", "text") == "text" and not str(block.get("text", "")).strip()
            for block in content
        )
    return content is None or not str(content).strip()
