"""How preference data is found, read and rendered: the settings that extraction, planning and training share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pairtrace.errors import ConfigError

if TYPE_CHECKING:
    from pairtrace.engine.pairs import PairSource
    from pairtrace.engine.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which pairs, and how they become tokens.

    Attributes:
        data: preference data: a file, a directory or a hub id.
        model: the checkpoint from before preference training (M0): a directory or a hub id.
        max_length: longest sequence in tokens, as in training; None for no limit.
        truncation: "keep_start" or "keep_end", as in training.
        limit: only the first rows of the data.
        format: name of the data's format; None recognises it.
        prompt, chosen, rejected, source: column names that override the recognised ones.
        split: split of a data set that has several.
        chat_template: file with a Jinja chat template that replaces the tokenizer's own.
        template_date: day (YYYY-MM-DD) for a chat template that prints the date: the day of training.
    """

    data: str
    model: str
    max_length: int | None = 1024
    truncation: str = "keep_start"
    limit: int | None = None
    format: str | None = None
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    source: str | None = None
    split: str | None = None
    chat_template: str | None = None
    template_date: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected a positive number")

    def open_source(self) -> PairSource:
        """Open the data.

        Raises:
            DataError: it cannot be read or recognised.
        """
        from pairtrace.engine.pairs import open_pairs

        return open_pairs(
            self.data,
            format=self.format,
            prompt=self.prompt,
            chosen=self.chosen,
            rejected=self.rejected,
            source=self.source,
            split=self.split,
            limit=self.limit,
        )

    def load_renderer(self, checkpoint: str) -> Renderer:
        """Load the tokenizer of `checkpoint` and set it up as training did.

        Raises:
            ModelError: there is no usable tokenizer, or its template prints the date and no day was given.
            ConfigError: the chat template cannot be read, or a setting is out of range.
        """
        from pairtrace.engine.checkpoint import load_tokenizer
        from pairtrace.engine.rendering import Renderer
        from pairtrace.engine.templates import chat_template_of

        tokenizer = load_tokenizer(checkpoint)
        return Renderer(
            tokenizer,
            max_length=self.max_length,
            truncation=self.truncation,
            chat_template=chat_template_of(tokenizer, self.chat_template, self.template_date),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(PairsConfig):
    """Which pairs, how they become tokens, and where they are read.

    Attributes:
        layers: residual layers; `l` is the stream after `l` blocks, 0 the embedding output.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("no layer was given; expected at least one, for example --layers 20")
        super().__post_init__()
