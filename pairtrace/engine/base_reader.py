"""The base model made ready to read responses: settings and tokenizer at once, weights when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pairtrace.engine.behavior_config import BehaviorConfig
from pairtrace.engine.cost import CostMeter
from pairtrace.engine.reading import Reading, choose_reading, fitting_store

if TYPE_CHECKING:
    from pairtrace.engine.backend import HFBackend
    from pairtrace.engine.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class BaseReader:
    """How responses are read through the base model of a behaviour.

    Attributes:
        config: of the behaviour.
        prints: fingerprints of model, tokenizer and template, by manifest field.
        reading: settings of the forward passes.
        renderer: of the base model's tokenizer.
    """

    config: BehaviorConfig
    prints: dict[str, str]
    reading: Reading
    renderer: Renderer

    @classmethod
    def prepare(cls, config: BehaviorConfig) -> BaseReader:
        """Find whatever could stop the reading before the sampling, which takes hours.

        Raises:
            ConfigError, ModelError, LayerError: an option or the checkpoint cannot be used.
            StoreMismatchError: the store was made with another model, tokenizer or template, or an option contradicts
                it.
        """
        from pairtrace.engine.architectures import check_layers, family_of
        from pairtrace.engine.checkpoint import load_config, model_fingerprint, resolve_device, resolve_dtype
        from pairtrace.engine.prompt_encoder import PromptEncoder
        from pairtrace.engine.rendering import Renderer

        encoder = PromptEncoder.load(
            config.base, chat_template=config.chat_template, template_date=config.template_date
        )
        prints = {
            "model_fingerprint": model_fingerprint(config.base),
            **{name: str(encoder.identity[name]) for name in ("tokenizer_fingerprint", "template_fingerprint")},
        }
        model_config = load_config(config.base)
        store = None if config.store is None else fitting_store(config.store, prints)
        reading = choose_reading(config, store, int(model_config.num_hidden_layers))
        check_layers(reading.layers, model_config)
        family_of(model_config, reading.max_length)
        resolve_device(config.device)
        resolve_dtype(reading.dtype, model_config)
        renderer = Renderer(
            encoder.tokenizer,
            max_length=reading.max_length,
            truncation=reading.truncation,
            chat_template=encoder.chat_template,
        )
        return cls(config=config, prints=prints, reading=reading, renderer=renderer)

    def load(self, meter: CostMeter) -> HFBackend:
        """The base model down to the deepest layer that is read; `meter` counts its tokens and operations.

        Raises:
            ModelError: weights are missing or damaged.
        """
        from pairtrace.engine.backend import HFBackend

        return HFBackend.load(
            self.config.base,
            self.reading.layers,
            device=self.config.device,
            dtype=self.reading.dtype,
            max_length=self.reading.max_length,
            token_budget=self.config.token_budget,
            fingerprint=self.prints["model_fingerprint"],
            meter=meter,
        )
