"""Which model families vLLM gives the hidden states of, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pairtrace.errors import UnsupportedModelError


@dataclass(frozen=True)
class VLLMFamily:
    """How vLLM runs a family.

    Attributes:
        lookup: layer 0 is looked up in the embedding, as its tokens' rows without any factor: the model does not give
            it out (vLLM runs the family's own transformers code, which only gives out what blocks return).
    """

    lookup: bool = False


# Each has an equivalence test against the transformers back end (tests/vllm/test_extraction.py).
VLLM_FAMILIES: dict[str, VLLMFamily] = {
    "llama": VLLMFamily(),
    "olmo2": VLLMFamily(lookup=True),
    "qwen2": VLLMFamily(),
    "qwen3": VLLMFamily(),
}


def vllm_family(config: Any) -> VLLMFamily:
    """Look up a model configuration.

    Raises:
        UnsupportedModelError: vLLM does not give out its hidden states, or nobody has compared them.
    """
    kind = getattr(config, "model_type", None)
    if kind not in VLLM_FAMILIES:
        raise UnsupportedModelError(
            f"model type {kind!r} is not supported with --backend vllm: its hidden states out of vLLM have not been "
            f"compared with the model's own; supported are {', '.join(sorted(VLLM_FAMILIES))}; use --backend hf"
        )
    return VLLM_FAMILIES[kind]
