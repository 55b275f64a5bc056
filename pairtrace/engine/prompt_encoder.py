"""From conversations to the tokens that a checkpoint answers; needs its tokenizer and configuration, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtrace.engine.checkpoint import load_config, load_tokenizer, resolve_checkpoint
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.templates import TemplateRefusal, apply_template, chat_template_of
from pairtrace.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptEncoder:
    """How one checkpoint reads a conversation and ends its answer.

    Attributes:
        model: the checkpoint as it was given, named in errors.
        tokenizer: of the checkpoint.
        chat_template: Jinja text that replaces the tokenizer's own template; None for its own.
        end_tokens: ids that end a response: those of the generation config and the tokenizer's end of sequence.
        context: tokens that the model can hold; None when its configuration does not say.
    """

    model: str
    tokenizer: Any
    chat_template: str | None
    end_tokens: tuple[int, ...]
    context: int | None

    def __post_init__(self) -> None:
        if self.chat_template is None and not self.tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self.model} has no chat template, so prompts cannot be rendered; give the one "
                "that training used with --chat-template FILE"
            )

    @classmethod
    def load(cls, model: str, *, chat_template: str | None = None, template_date: str | None = None) -> PromptEncoder:
        """Read tokenizer, chat template and generation config of a checkpoint.

        Args:
            model: checkpoint directory or hub id.
            chat_template: file with a template that replaces the tokenizer's own.
            template_date: day (YYYY-MM-DD) for a template that prints the date.

        Raises:
            ModelError: a file of the checkpoint is missing or damaged, or there is no chat template.
            ConfigError: the chat template cannot be read, or the day is not a date.
        """
        path = resolve_checkpoint(model)
        config = load_config(path)
        tokenizer = load_tokenizer(path)
        return cls(
            model=model,
            tokenizer=tokenizer,
            chat_template=chat_template_of(tokenizer, chat_template, template_date),
            end_tokens=_end_tokens(path, config, tokenizer),
            context=getattr(config, "max_position_embeddings", None),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the tokens of a prompt and where an answer ends, as plain JSON values."""
        tokenizer, template = fingerprints(self.tokenizer, self.chat_template)
        return {
            "tokenizer_fingerprint": tokenizer,
            "template_fingerprint": template,
            "end_tokens": list(self.end_tokens),
        }

    def encode(self, name: str, messages: Sequence[dict[str, Any]], max_new_tokens: int = 0) -> list[int]:
        """Token ids of a conversation up to where the answer begins (chat template, generation prompt).

        Args:
            name: of the conversation, for errors.
            messages: the conversation, ending with the user.
            max_new_tokens: room that the answer needs.

        Raises:
            DataError: the chat template refuses the conversation, or its text is not valid Unicode.
            ModelError: the template is not valid Jinja.
            ConfigError: the prompt leaves no room for the answer in the model's context.
        """
        ids: list[int] = self.tokenizer(self._render(name, messages), add_special_tokens=False)["input_ids"]
        if self.context is not None and len(ids) + max_new_tokens > self.context:
            raise ConfigError(
                f"{name}: the prompt has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} it exceeds the "
                f"context of {self.model}, {self.context} tokens"
            )
        return ids

    def _render(self, name: str, messages: Sequence[dict[str, Any]]) -> str:
        options: dict[str, Any] = {} if self.chat_template is None else {"chat_template": self.chat_template}
        try:
            text = apply_template(
                self.tokenizer,
                messages,
                generation_prompt=True,
                name=f"the chat template of {self.model}",
                **options,
            )
        except TemplateRefusal as error:
            raise DataError(
                f"{name}: the chat template of {self.model} refuses the conversation ({error}); "
                "change the prompt or give another template with --chat-template"
            ) from error
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: the text is not valid Unicode ({error.reason})") from error
        return text


def _end_tokens(path: Path, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens that transformers would generate with, and the tokenizer's own."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(path)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path / 'generation_config.json'} cannot be read: {error}") from error
    else:
        generation = GenerationConfig.from_model_config(config)
    configured = generation.eos_token_id
    ends = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return tuple(sorted(set(ends)))
