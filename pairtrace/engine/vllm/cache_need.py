"""How much cache one sequence needs, found before minutes of starting an engine that could not run it."""

from __future__ import annotations

from typing import Any

from pairtrace.engine.flops import ModelShape
from pairtrace.engine.vllm.options import VLLMOptions
from pairtrace.errors import ConfigError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bytes_per_token(config: Any, layers: tuple[int, ...], dtype: str, tensor_parallel: int) -> int:
    """Keys and values of every block up to the deepest layer, and the hidden states of the layers, on one device."""
    shape, item = ModelShape.from_config(config), _BYTES[dtype]
    heads = -(-shape.kv_heads // tensor_parallel)
    keys_and_values = 2 * max(1, layers[-1]) * heads * shape.head_width
    return int(item * (keys_and_values + len(layers) * shape.width))


def require_cache(config: Any, layers: tuple[int, ...], longest: int, dtype: str, options: VLLMOptions) -> None:
    """Make sure that the cache asked for holds one sequence; nothing is checked where vLLM decides its size.

    Args:
        config: transformers configuration of the whole model.
        layers: residual layers, ascending.
        longest: tokens of the longest sequence.
        dtype: of the forward pass.
        options: with the size of the cache.

    Raises:
        ConfigError: it does not.
    """
    if options.cache_gib is None:
        return
    needed = (longest + 1) * bytes_per_token(config, layers, dtype, options.tensor_parallel)
    if options.cache_gib * 2**30 < needed:
        raise ConfigError(
            f"--cache-gib {options.cache_gib:g} does not hold one sequence of {longest} tokens, which needs at least "
            f"{needed / 2**30:.3g} GiB (keys, values and hidden states of {len(layers)} layers); raise it, or lower "
            "--max-length"
        )
