"""Which sampler answers for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pairtrace.engine.prompt_encoder import PromptEncoder
    from pairtrace.engine.sampling import Sampler
    from pairtrace.engine.vllm.adapters import Adapter
    from pairtrace.engine.vllm.options import VLLMOptions
    from pairtrace.engine.vllm.sampler import VLLMSampler


def load_sampler(
    encoder: PromptEncoder,
    *,
    backend: str,
    device: str,
    dtype: str,
    options: VLLMOptions | None = None,
    adapter: Adapter | None = None,
) -> Sampler | VLLMSampler:
    """The checkpoint of an encoder, ready to answer.

    Args:
        encoder: of the checkpoint.
        backend: "hf" or "vllm".
        device, dtype: of the forward pass.
        options: how vLLM is run.
        adapter: that requests may name; for vLLM only.

    Raises:
        ModelError, ConfigError, MissingDependencyError: it cannot be loaded.
    """
    if backend == "hf":
        from pairtrace.engine.sampling import Sampler

        assert adapter is None
        return Sampler.load(encoder, device=device, dtype=dtype)
    from pairtrace.engine.vllm.sampler import VLLMSampler

    adapters = () if adapter is None else (adapter,)
    return VLLMSampler(encoder, device=device, dtype=dtype, adapters=adapters, options=options)


@contextmanager
def released(sampler: Sampler | VLLMSampler) -> Iterator[Sampler | VLLMSampler]:
    """Lends a sampler; behind it, its engine has ended."""
    try:
        yield sampler
    finally:
        sampler.close()
