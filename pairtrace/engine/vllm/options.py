"""How vLLM is to be run, whatever for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pairtrace.errors import ConfigError

BACKENDS = ("hf", "vllm")
# Arguments of `vllm.LLM` that pairtrace decides by itself: another value would give other rows, or none.
_OURS = frozenset(
    {"model", "dtype", "tensor_parallel_size", "data_parallel_size", "max_model_len", "skip_tokenizer_init",
     "speculative_config", "kv_transfer_config", "worker_extension_cls", "trust_remote_code", "load_format",
     "generation_config", "kv_cache_memory_bytes", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "quantization",
     "quantization_config", "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
     "hf_overrides", "hf_config_path", "model_class_overrides", "disable_sliding_window", "spec_method", "spec_model",
     "spec_tokens", "runner", "convert", "watermark_config"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """How vLLM is run.

    Attributes:
        tensor_parallel: devices that share one copy of the model.
        data_parallel: copies of the model, each with devices of its own, that share the work.
        cache_gib: memory for keys, values and hidden states per device, in GiB; None takes vLLM's share of a GPU, or 4
            on a CPU.
        engine: further arguments of `vllm.LLM`, such as `enable_prefix_caching` or `max_num_batched_tokens`.
    """

    tensor_parallel: int = 1
    data_parallel: int = 1
    cache_gib: float | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        if self.cache_gib is not None and not 0 < self.cache_gib < float("inf"):
            raise ConfigError(f"--cache-gib is {self.cache_gib}; expected a positive number")
        ours = sorted(_OURS & set(self.engine))
        if ours:
            raise ConfigError(f"--engine-option may not set {', '.join(ours)}: pairtrace decides that itself")


def check_backend(backend: str, options: VLLMOptions | None, known: tuple[str, ...] = BACKENDS) -> None:
    """Make sure that a back end is known, and that options of vLLM come with it only.

    Raises:
        ConfigError: they do not fit.
    """
    if backend not in known:
        raise ConfigError(f"--backend is {backend!r}; expected one of {', '.join(known)}")
    if options is not None and backend != "vllm":
        raise ConfigError(
            "--tensor-parallel, --data-parallel, --cache-gib and --engine-option are for --backend vllm, "
            f"but --backend is {backend}"
        )
