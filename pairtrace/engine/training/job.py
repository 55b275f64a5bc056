"""What a training run works with, before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from pairtrace.engine.checkpoint import model_fingerprint, require_whole_weights, resolve_checkpoint, resolve_device
from pairtrace.engine.fingerprints import fingerprints
from pairtrace.engine.training.config import TrainConfig
from pairtrace.engine.versions import library_versions

if TYPE_CHECKING:
    from pairtrace.engine.rendering import Renderer

logger = logging.getLogger(__name__)


class TrainingSource(Protocol):
    """Data to train on."""

    @property
    def fingerprint(self) -> str:
        """Of its content, hex."""

    def describe(self) -> str:
        """What was found, in a sentence."""


Source = TypeVar("Source", bound=TrainingSource)


@dataclass(frozen=True, kw_only=True)
class Job(Generic[Source]):
    """One training run.

    Attributes:
        config: the settings.
        base: directory of M0.
        source: the data.
        renderer: makes tokens of it.
        device: where the model is trained.
        bfloat16: whether forward passes run in bfloat16.
        identity: everything that decides the trained weights; plain JSON values.
        versions: of the libraries.
    """

    config: TrainConfig
    base: Path
    source: Source
    renderer: Renderer
    device: torch.device
    bfloat16: bool
    identity: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def prepare(cls, config: TrainConfig, open_source: Callable[[], Source]) -> Job[Source]:
        """Open data and tokenizer and take fingerprints; reads the checkpoint's weights once.

        Args:
            config: the settings.
            open_source: opens the data.

        Raises:
            ConfigError: the device is not there, or the chat template cannot be read.
            DataError: the data cannot be read or recognised.
            ModelError: the checkpoint is damaged or half written, or its tokenizer cannot be used.
        """
        base = resolve_checkpoint(config.model)
        require_whole_weights(base)
        weights = model_fingerprint(base)
        source = open_source()
        logger.info("%s", source.describe())
        renderer = config.load_renderer(str(base))
        tokenizer, template = fingerprints(renderer.tokenizer, renderer.chat_template)
        device = resolve_device(config.device)
        bfloat16 = config.compute_dtype == "bfloat16" or (
            config.compute_dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        identity = {
            **config.identity(),
            "compute_dtype": "bfloat16" if bfloat16 else "float32",
            "model_fingerprint": weights,
            "data_fingerprint": source.fingerprint,
            "tokenizer_fingerprint": tokenizer,
            "template_fingerprint": template,
        }
        versions = library_versions() | {name: metadata.version(name) for name in ("trl", "peft", "accelerate")}
        return cls(
            config=config,
            base=base,
            source=source,
            renderer=renderer,
            device=device,
            bfloat16=bfloat16,
            identity=identity,
            versions=versions,
        )

    @property
    def weights_dtype(self) -> str:
        """Dtype in which the weights are held: an adapter's frozen base may be as coarse as the forward pass."""
        return "bfloat16" if self.bfloat16 and self.config.lora is not None else "float32"

    @property
    def precision(self) -> str:
        """How the log-probabilities of the reference are computed."""
        return self.weights_dtype + ("-in-bfloat16" if self.bfloat16 else "")
