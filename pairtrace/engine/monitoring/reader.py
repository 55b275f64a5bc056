"""Answers as behaviour-change vectors: both M0's and the model's are read through M0. Legend: P items, D width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pairtrace.engine.discovery.prompt_bag import PromptBag, bag_items, bag_vectors
from pairtrace.engine.rendering import Renderer

if TYPE_CHECKING:
    from pairtrace.engine.cost import CostMeter
    from pairtrace.engine.monitoring.config import MonitorConfig
    from pairtrace.engine.monitoring.side_cache import SideCache
    from pairtrace.engine.progress import Progress
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.rollout_table import RolloutTable


class AnswerReader:
    """M0, loaded when it is first needed.

    Args:
        config: of the monitor.
        encoder: of M0.
        layer: that is read.
        fingerprint: of M0's weights.
        device: name of the device of the forward passes.
        meter: counts tokens and operations.
    """

    def __init__(
        self,
        config: MonitorConfig,
        encoder: PromptEncoder,
        *,
        layer: int,
        fingerprint: str,
        device: str,
        meter: CostMeter | None,
    ) -> None:
        self._config = config
        self._layer = layer
        self._fingerprint = fingerprint
        self._device = device
        self._meter = meter
        self._max_length = config.max_length or None
        self._renderer = Renderer(
            encoder.tokenizer,
            max_length=self._max_length,
            truncation=config.truncation,
            chat_template=encoder.chat_template,
        )
        self._cache: SideCache | None = None

    def read(self, table: RolloutTable, progress: Progress) -> PromptBag:
        """The vectors of a table with M0's answers and those of another model.

        Raises:
            LayerError: the layer is outside the model.
            UnsupportedModelError: the architecture is not reproduced exactly.
            ModelError: the weights cannot be loaded.
        """
        cache = self._loaded()
        bag = bag_vectors(table, bag_items(table), self._renderer, cache, progress)
        cache.forget()
        return bag

    def _loaded(self) -> SideCache:
        if self._cache is None:
            from pairtrace.engine.backend import HFBackend
            from pairtrace.engine.monitoring.side_cache import SideCache

            backend = HFBackend.load(
                self._config.base,
                (self._layer,),
                device=self._device,
                dtype=self._config.dtype,
                max_length=self._max_length,
                token_budget=self._config.token_budget,
                fingerprint=self._fingerprint,
                meter=self._meter,
            )
            self._cache = SideCache(backend)
        return self._cache
