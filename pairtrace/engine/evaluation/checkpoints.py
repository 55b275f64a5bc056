"""Checkpoints under evaluation: checked before any work, loaded when first needed."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pairtrace.engine.checkpoint import load_config, require_whole_weights, resolve_checkpoint, resolve_device
from pairtrace.engine.evaluation.config import EvaluateConfig
from pairtrace.engine.evaluation.requests import Request
from pairtrace.engine.flops import ModelShape
from pairtrace.engine.prompt_encoder import PromptEncoder
from pairtrace.engine.samplers import load_sampler
from pairtrace.engine.vllm.adapters import find_adapter, fingerprint_of
from pairtrace.errors import ConfigError, ModelError, UnsupportedModelError

if TYPE_CHECKING:
    from pairtrace.engine.sampling import Sampler
    from pairtrace.engine.vllm.sampler import VLLMSampler


class Checkpoint:
    """One model.

    Attributes:
        name: as it was given.
        encoder: its tokenizer and chat template.
        fingerprint: of its weights and configuration.
    """

    def __init__(self, name: str, config: EvaluateConfig) -> None:
        self.name = name
        self._adapter = find_adapter(name) if config.backend == "vllm" else None
        if self._adapter is not None and (config.base is not None or config.data is not None or config.lm_eval):
            raise ConfigError(f"{name} is an adapter: --base, --data and --lm-eval need it merged into a checkpoint")
        weights = name if self._adapter is None else self._adapter.base
        if not weights:
            raise ModelError(f"{name} is an adapter whose adapter_config.json does not name base_model_name_or_path")
        require_whole_weights(resolve_checkpoint(weights))
        self.fingerprint = fingerprint_of(name, weights)
        self.encoder = PromptEncoder.load(
            weights, chat_template=config.chat_template, template_date=config.template_date
        )
        self._config = config
        self._sampler: Sampler | VLLMSampler | None = None
        self._backend = config.backend
        resolve_device(config.device)

    @property
    def adapter_path(self) -> str | None:
        """Directory of the adapter that this model is; None for a checkpoint."""
        return None if self._adapter is None else str(self._adapter.path)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides anything that the model says: weights, tokenizer, template, end tokens, dtype."""
        return {"model_fingerprint": self.fingerprint, **self.encoder.identity, "dtype": self._config.dtype}

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of its tokenizer."""
        return str(self.encoder.identity["tokenizer_fingerprint"])

    @property
    def sampler(self) -> Sampler | VLLMSampler:
        """The model, ready to answer; loaded when first needed.

        Raises:
            ModelError: weights are missing or damaged.
            MissingDependencyError: the back end vllm without vLLM.
        """
        return self._loaded(self._config.backend)

    @property
    def model(self) -> Any:
        """The transformers model; loaded when first needed, in the place of another back end's.

        Raises:
            ModelError: weights are missing or damaged.
        """
        sampler: Any = self._loaded("hf")
        return sampler.model

    @property
    def shape(self) -> ModelShape | None:
        """The sizes that decide its operations; None for a model type without a formula."""
        try:
            return ModelShape.from_config(load_config(self.encoder.model))
        except UnsupportedModelError:
            return None

    def release(self) -> None:
        """Give the memory of the weights back."""
        if self._sampler is not None:
            import torch

            self._sampler.close()
            self._sampler = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _loaded(self, backend: str) -> Sampler | VLLMSampler:
        if self._sampler is None or self._backend != backend:
            self.release()
            self._backend = backend
            config = self._config
            self._sampler = load_sampler(
                self.encoder,
                backend=backend,
                device=config.device,
                dtype=config.dtype,
                options=config.vllm,
                adapter=self._adapter,
            )
        return self._sampler


class PromptTokens:
    """The requests as token ids, once for all models that read them alike."""

    def __init__(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        self._requests = requests
        self._max_new_tokens = max_new_tokens
        self._known: dict[str, list[list[int]]] = {}

    def of(self, encoder: PromptEncoder) -> list[list[int]]:
        """Token ids of each request, up to where the answer begins.

        Raises:
            DataError, ConfigError, ModelError: see `PromptEncoder.encode`.
        """
        key = str({**encoder.identity, "context": encoder.context})
        if key not in self._known:
            self._known[key] = [
                encoder.encode(request.name, request.messages(), self._max_new_tokens) for request in self._requests
            ]
        return self._known[key]


def require_same_tokenizer(model: Checkpoint, base: Checkpoint) -> None:
    """Check that two models spread their probability over the same tokens.

    Raises:
        ModelError: they do not.
    """
    if model.tokenizer_fingerprint != base.tokenizer_fingerprint:
        raise ModelError(
            f"{model.name} has a tokenizer with fingerprint {model.tokenizer_fingerprint[:12]}, --base {base.name} one "
            f"with {base.tokenizer_fingerprint[:12]}: drift and implicit rewards compare probabilities of the same "
            "tokens; leave --base out, or give the checkpoint that this model was trained from"
        )
