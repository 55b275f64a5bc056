"""Which model families the packed forward reproduces exactly, and how each one is cut at a depth."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pairtrace.errors import LayerError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder are.

    Attributes:
        blocks: attribute of the base model that holds the decoder blocks.
        final_norm: attribute of the base model that holds the norm after the last block.
        middle: attribute of a block that holds what the residual stream between attention and MLP is given to; None
            where both read the block's input.
    """

    blocks: str = "layers"
    final_norm: str = "norm"
    middle: str | None = "post_attention_layernorm"


# Each of these has an equivalence test against its own unpacked forward pass (tests/engine/test_equivalence.py).
# A family outside this table is refused: position schemes and masks that only the model's own mask-building code
# knows (ALiBi, chunked attention, attention sinks) would come out wrong in silence.
FAMILIES: dict[str, Family] = {
    "gemma": Family(),
    "gemma2": Family(middle="pre_feedforward_layernorm"),
    # Its second norm reads the block's input, or with use_parallel_residual off the stream after attention.
    "gpt_neox": Family(final_norm="final_layer_norm"),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo": Family(),
    "olmo2": Family(middle="mlp"),
    "olmo3": Family(middle="mlp"),
    "phi": Family(final_norm="final_layernorm", middle=None),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "qwen3_moe": Family(),
    "smollm3": Family(),
    "starcoder2": Family(),
}

# Lists of a configuration with one entry per block.
PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")


def family_of(config: Any, max_length: int | None) -> Family:
    """Look up the family of a model configuration, refusing what would come out wrong.

    Args:
        config: a transformers configuration.
        max_length: longest sequence that will be run, in tokens; None when unlimited.

    Raises:
        UnsupportedModelError: the architecture, or its rotary scaling at this length, is not reproduced exactly.
    """
    family = known_family(config)
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models hold one set of rotary parameters per attention type.
    variants = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for variant in variants:
        if variant.get("rope_type") in ("dynamic", "longrope"):
            trained = variant.get("original_max_position_embeddings") or limit
            if trained is not None and (max_length is None or max_length > trained):
                raise UnsupportedModelError(
                    f"rotary scaling {variant['rope_type']!r} changes with the longest sequence of a batch beyond "
                    f"{trained} tokens, so a row's values would depend on its neighbours; "
                    f"give --max-length {trained} or less (now {max_length})"
                )
    return family


def known_family(config: Any) -> Family:
    """Look up the family of a model configuration, whatever the length of its sequences.

    Raises:
        UnsupportedModelError: the architecture is not in the table.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported: its attention is not known to be reproduced exactly by "
            f"the packed forward; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def check_layers(layers: tuple[int, ...], config: Any) -> None:
    """Make sure every layer exists: 0 is the embedding output, `l` the residual stream after `l` blocks.

    Raises:
        LayerError: a layer is below 0 or beyond the number of blocks.
    """
    blocks = config.num_hidden_layers
    wrong = [layer for layer in layers if not 0 <= layer <= blocks]
    if wrong:
        raise LayerError(
            f"layer {wrong[0]} is outside this model: expected 0 (embedding output) to {blocks} "
            f"(after the last of {blocks} blocks, before the final norm)"
        )


def truncated_config(config: Any, depth: int) -> Any:
    """Return a copy of `config` with only its first `depth` blocks (at least one, which a model needs to load)."""
    shallow = copy.deepcopy(config)
    blocks = max(1, depth)
    # Per-layer lists first: the configuration validates their length against the number of blocks.
    for name in PER_LAYER_LISTS:
        values = getattr(shallow, name, None)
        if isinstance(values, list) and len(values) == config.num_hidden_layers:
            object.__setattr__(shallow, name, values[:blocks])
    object.__setattr__(shallow, "num_hidden_layers", blocks)
    if getattr(shallow, "max_window_layers", None) is not None:
        object.__setattr__(shallow, "max_window_layers", min(shallow.max_window_layers, blocks))
    return shallow
